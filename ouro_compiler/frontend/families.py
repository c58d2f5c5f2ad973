"""What the tensors of each family of models are called, and the architecture that they imply.

An architecture is inferred from names and shapes alone; tensors on the meta device do. Every
ModelError here is one sentence about the file's tensors. Whether all the others fit is left to
`detect.check_state`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import Tensor

from ouro_compiler.errors import ModelError
from ouro_compiler.models import mambavision, vim, vit, vmamba
from ouro_compiler.models.mambavision import MambaVisionConfig
from ouro_compiler.models.vim import VimConfig
from ouro_compiler.models.vit import ViTConfig
from ouro_compiler.models.vmamba import VMambaConfig

State = Mapping[str, Tensor]
Config = VimConfig | VMambaConfig | MambaVisionConfig | ViTConfig


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family of models.

    title: what messages call it. mark: matches names that no other family has; sample: one of them.
    architectures: the sizes that have a name. infer: the architecture of a state_dict with this
    many classes. told: what shapes tell of an architecture, less the number of classes. untold:
    what they do not, where that makes an architecture without a name unusable.
    """

    title: str
    mark: re.Pattern[str]
    sample: str
    head: str
    architectures: dict[str, Any]
    infer: Callable[[State, int], Config]
    told: Callable[[Any], object]
    untold: str = ""


def shape_of(state: State, key: str, dims: int, title: str) -> tuple[int, ...]:
    """The shape of a tensor of `dims` dimensions, none of them empty."""
    if key not in state:
        raise ModelError(f"a {title} needs the tensor {key}, which is missing")
    shape = tuple(state[key].shape)
    if len(shape) != dims or 0 in shape:
        raise ModelError(
            f"tensor {key} has shape {shape}, but a {title} has {dims} non-empty dimensions there"
        )
    return shape


def _count(state: State, pattern: str) -> int:
    """How many values the pattern's group takes."""
    return len({match[1] for key in state if (match := re.match(pattern, key))})


# Vim


def _infer_vim(state: State, num_classes: int) -> VimConfig:
    def shape(key: str, dims: int) -> tuple[int, ...]:
        return shape_of(state, key, dims, "Vim")

    cls_position: Literal["middle", "none"] = "middle" if "cls_token" in state else "none"
    _, tokens, embed_dim = shape("pos_embed", 3)
    _, in_chans, patch_size, _ = shape("patch_embed.proj.weight", 4)
    img_size, stride = _image_and_stride(tokens - (cls_position != "none"), patch_size)
    mixer = "layers.0.mixer."
    features, _ = shape(f"{mixer}in_proj.weight", 2)
    if features % (2 * embed_dim):
        raise ModelError(
            f"tensor {mixer}in_proj.weight has {features} rows, which is no multiple of twice the "
            f"{embed_dim} channels of pos_embed"
        )
    return VimConfig(
        img_size=img_size,
        patch_size=patch_size,
        stride=stride,
        in_chans=in_chans,
        embed_dim=embed_dim,
        depth=_count(state, r"layers\.(\d+)\."),
        d_state=shape(f"{mixer}A_log", 2)[1],
        d_conv=shape(f"{mixer}conv1d.weight", 3)[2],
        expand=features // (2 * embed_dim),
        dt_rank=shape(f"{mixer}dt_proj.weight", 2)[1],
        num_classes=num_classes,
        norm="layer" if "layers.0.norm.bias" in state else "rms",
        cls_position=cls_position,
        final_pool="mean" if cls_position == "none" else "cls",
    )


def _image_and_stride(patches: int, patch_size: int) -> tuple[int, int]:
    """(image side, stride) of a square grid of patches, both in pixels."""
    grid = _side(patches)
    if (patch_size, grid) == (16, 27):  # the public fine-tuned models: overlapping patches of 224
        return 224, 8
    return grid * patch_size, patch_size


def _side(patches: int) -> int:
    grid = math.isqrt(max(patches, 0))
    if grid == 0 or grid * grid != patches:
        raise ModelError(
            f"pos_embed has {patches} positions besides the class token, which is no square grid"
        )
    return grid


def _told_of_vim(config: VimConfig) -> tuple[object, ...]:
    return (
        config.patch_size,
        config.in_chans,
        config.embed_dim,
        config.depth,
        config.d_state,
        config.d_conv,
        config.expand,
        config.rank,
        config.norm,
        config.cls_position != "none",
        config.num_tokens,
    )


def _all_but(*fields: str) -> Callable[[Any], object]:
    def told(config: Any) -> object:
        left_out = ("num_classes", *fields)
        return {key: value for key, value in asdict(config).items() if key not in left_out}

    return told


# VMamba


def _infer_vmamba(state: State, num_classes: int) -> VMambaConfig:
    def shape(key: str, dims: int) -> tuple[int, ...]:
        return shape_of(state, key, dims, "VMamba")

    block = "layers.0.blocks.0."
    (embed_dim,) = shape(f"{block}norm.weight", 1)
    _, _, inner = shape(f"{block}op.x_proj_weight", 3)
    features, _ = shape(f"{block}op.in_proj.weight", 2)
    stages = _count(state, r"layers\.(\d+)\.")
    mlp = f"{block}mlp.fc1.weight"
    _, in_chans, patch_size, _ = shape("patch_embed.0.weight", 4)
    overlapping = "patch_embed.5.weight" in state
    return VMambaConfig(
        patch_size=4 if overlapping else patch_size,
        in_chans=in_chans,
        embed_dim=embed_dim,
        depths=tuple(_count(state, rf"layers\.{s}\.blocks\.(\d+)\.") for s in range(stages)),
        d_state=shape(f"{block}op.A_logs", 2)[1],
        d_conv=shape(f"{block}op.conv2d.weight", 4)[2],
        ssm_ratio=inner / embed_dim,
        conv_bias=f"{block}op.conv2d.bias" in state,
        gate=features == 2 * inner,
        mlp_ratio=shape(mlp, 2)[0] / embed_dim if mlp in state else 0.0,
        patch_embed="v2" if overlapping else "v1",
        downsample=_downsample(state),
        num_classes=num_classes,
    )


def _downsample(state: State) -> Literal["v1", "v2", "v3"]:
    if "layers.0.downsample.reduction.weight" in state:
        return "v1"
    key = "layers.0.downsample.1.weight"
    return "v2" if key in state and shape_of(state, key, 4, "VMamba")[2] == 2 else "v3"


# MambaVision


def _infer_mambavision(state: State, num_classes: int) -> MambaVisionConfig:
    def shape(key: str, dims: int) -> tuple[int, ...]:
        return shape_of(state, key, dims, "MambaVision")

    stem_dim, in_chans, _, _ = shape("patch_embed.conv_down.0.weight", 4)
    embed_dim = shape("patch_embed.conv_down.3.weight", 4)[0]
    block = "levels.2.blocks.0."
    first, second, third, fourth = (
        _count(state, rf"levels\.{stage}\.blocks\.(\d+)\.") for stage in range(4)
    )
    return MambaVisionConfig(
        stem_dim=stem_dim,
        in_chans=in_chans,
        embed_dim=embed_dim,
        depths=(first, second, third, fourth),
        d_state=shape(f"{block}mixer.A_log", 2)[1],
        d_conv=shape(f"{block}mixer.conv1d_x.weight", 3)[2],
        mlp_ratio=shape(f"{block}mlp.fc1.weight", 2)[0] / (4 * embed_dim),
        layer_scale=f"{block}gamma_1" in state,
        num_classes=num_classes,
    )


# ViT


def _infer_vit(state: State, num_classes: int) -> ViTConfig:
    def shape(key: str, dims: int) -> tuple[int, ...]:
        return shape_of(state, key, dims, "ViT")

    _, tokens, embed_dim = shape("pos_embed", 3)
    _, in_chans, patch_size, _ = shape("patch_embed.proj.weight", 4)
    return ViTConfig(
        img_size=_side(tokens - ("cls_token" in state)) * patch_size,
        patch_size=patch_size,
        in_chans=in_chans,
        embed_dim=embed_dim,
        depth=_count(state, r"blocks\.(\d+)\."),
        mlp_ratio=shape("blocks.0.mlp.fc1.weight", 2)[0] / embed_dim,
        num_classes=num_classes,
    )


FAMILIES = (
    Family(
        title="Vim",
        mark=re.compile(r"layers\.\d+\.mixer\."),
        sample="layers.0.mixer.A_log",
        head="head.weight",
        architectures=vim.ARCHITECTURES,
        infer=_infer_vim,
        told=_told_of_vim,
    ),
    Family(
        title="VMamba",
        mark=re.compile(r"layers\.\d+\.blocks\.\d+\.(op|self_attention)\."),
        sample="layers.0.blocks.0.op.A_logs",
        head="classifier.head.weight",
        architectures=vmamba.ARCHITECTURES,
        infer=_infer_vmamba,
        told=_all_but("img_size"),
    ),
    Family(
        title="MambaVision",
        mark=re.compile(r"levels\.\d+\.|patch_embed\.conv_down\."),
        sample="levels.0.blocks.0.conv1.weight",
        head="head.weight",
        architectures=mambavision.ARCHITECTURES,
        infer=_infer_mambavision,
        told=_all_but("img_size", "patch_size", "heads", "windows", "crop"),
        untold="the number of heads and the size of the windows",
    ),
    Family(
        title="ViT",
        mark=re.compile(r"blocks\.\d+\.attn\."),
        sample="blocks.0.attn.qkv.weight",
        head="head.weight",
        architectures=vit.ARCHITECTURES,
        infer=_infer_vit,
        told=_all_but("heads", "norm_eps", "mean", "std", "crop"),
        untold="the number of heads and how images are normalised",
    ),
)
