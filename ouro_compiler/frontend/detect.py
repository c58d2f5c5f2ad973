"""Which Vim a state_dict belongs to, told by the names and shapes of its tensors alone."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Literal

from torch import Tensor, nn

from ouro_compiler.errors import ModelError
from ouro_compiler.models.vim import ARCHITECTURES, VimConfig

_OTHER_FAMILIES = {
    "VMamba": re.compile(r"layers\.\d+\.blocks\.\d+\.op\.A_logs"),
    "MambaVision": re.compile(r"levels\.\d+\."),
}
_LAYER = re.compile(r"layers\.(\d+)\.")
_MIXER = re.compile(r"layers\.\d+\.mixer\.")
_SHOWN = 3  # how many of a long list of names a message shows


def detect_vim(state: Mapping[str, Tensor], *, arch: str | None = None) -> tuple[str, VimConfig]:
    """(name, architecture) of a Vim's state_dict; only names and shapes are read, meta tensors do.

    arch: a key of ARCHITECTURES that wins over what the shapes suggest (num_classes apart). Without
    it the first of ARCHITECTURES with the same shapes is taken, else the architecture is called
    "vim". Shapes do not tell where the class token is nor whether the two directions are averaged:
    VimConfig's defaults (in the middle, averaged) are what every public checkpoint uses.
    Raises ModelError for another family, a missing tensor, or a shape that fits no Vim. What is not
    needed here is left to `check_state`.
    """
    _check_family(state)
    num_classes, _ = _shape(state, "head.weight", 2)
    if arch is not None:
        return arch, replace(ARCHITECTURES[arch], num_classes=num_classes)
    inferred = _infer(state, num_classes)
    for name, known in ARCHITECTURES.items():
        if _fingerprint(known) == _fingerprint(inferred):
            return name, replace(known, num_classes=num_classes)
    return "vim", inferred


def check_state(state: Mapping[str, Tensor], module: nn.Module, name: str) -> None:
    """Raises ModelError unless the tensors have the names and shapes that `module` has.

    name: what the message calls the module's architecture.
    """
    expected = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    for key, tensor in state.items():
        found = tuple(tensor.shape)
        if key in expected and found != expected[key]:
            raise ModelError(f"tensor {key} has shape {found}, but {name} expects {expected[key]}")
    missing = [key for key in expected if key not in state]
    if missing:
        raise ModelError(f"{name} needs tensors that are missing: {_first(missing)}")
    unexpected = [key for key in state if key not in expected]
    if unexpected:
        raise ModelError(f"there are tensors that {name} does not have: {_first(unexpected)}")


def _first(names: Iterable[str]) -> str:
    names = list(names)
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + rest


def _check_family(state: Mapping[str, Tensor]) -> None:
    for family, pattern in _OTHER_FAMILIES.items():
        if any(pattern.match(key) for key in state):
            raise ModelError(
                f"these are weights of the {family} family, which is not supported yet"
            )
    if not any(_MIXER.match(key) for key in state):
        raise ModelError(
            "these are not the weights of a Vim: no tensor is named like layers.0.mixer.A_log, "
            f"found {_first(state)}"
        )


def _shape(state: Mapping[str, Tensor], key: str, dims: int) -> tuple[int, ...]:
    """The shape of a tensor of `dims` dimensions, none of them empty."""
    if key not in state:
        raise ModelError(f"a Vim needs the tensor {key}, which is missing")
    shape = tuple(state[key].shape)
    if len(shape) != dims or 0 in shape:
        raise ModelError(
            f"tensor {key} has shape {shape}, but a Vim has {dims} non-empty dimensions there"
        )
    return shape


def _infer(state: Mapping[str, Tensor], num_classes: int) -> VimConfig:
    cls_position: Literal["middle", "none"] = "middle" if "cls_token" in state else "none"
    _, tokens, embed_dim = _shape(state, "pos_embed", 3)
    _, in_chans, patch_size, _ = _shape(state, "patch_embed.proj.weight", 4)
    img_size, stride = _image_and_stride(tokens - (cls_position != "none"), patch_size)
    mixer = "layers.0.mixer."
    features, _ = _shape(state, f"{mixer}in_proj.weight", 2)
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
        depth=len({match[1] for key in state if (match := _LAYER.match(key))}),
        d_state=_shape(state, f"{mixer}A_log", 2)[1],
        d_conv=_shape(state, f"{mixer}conv1d.weight", 3)[2],
        expand=features // (2 * embed_dim),
        dt_rank=_shape(state, f"{mixer}dt_proj.weight", 2)[1],
        num_classes=num_classes,
        norm="layer" if "layers.0.norm.bias" in state else "rms",
        cls_position=cls_position,
        final_pool="mean" if cls_position == "none" else "cls",
    )


def _image_and_stride(patches: int, patch_size: int) -> tuple[int, int]:
    """(image side, stride) of a square grid of patches, both in pixels."""
    grid = math.isqrt(max(patches, 0))
    if grid == 0 or grid * grid != patches:
        raise ModelError(
            f"pos_embed has {patches} positions besides the class token, which is no square grid"
        )
    if (patch_size, grid) == (16, 27):  # the public fine-tuned models: overlapping patches of 224
        return 224, 8
    return grid * patch_size, patch_size


def _fingerprint(config: VimConfig) -> tuple[object, ...]:
    """What shapes tell of an architecture, less the number of classes."""
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
