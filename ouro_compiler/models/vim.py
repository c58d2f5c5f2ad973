"""Vim (Vision Mamba, arXiv 2401.09417): bidirectional v2 blocks in plain PyTorch on ouro ops.

The state_dict keys are those of the public Vim checkpoints (`layers.N.mixer.A_b_log`, ...), so that
a public checkpoint loads strictly. mamba_ssm is not needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ouro_compiler.ops  # noqa: F401  (registers torch.ops.ouro)


@dataclass(frozen=True, kw_only=True)
class VimConfig:
    """Everything that fixes a Vim's architecture; lengths in pixels, tokens or channels."""

    img_size: int = 224
    patch_size: int = 16
    stride: int = 16
    in_chans: int = 3
    embed_dim: int = 192
    depth: int = 24
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    dt_rank: int | None = None  # None: ceil(embed_dim / 16)
    num_classes: int = 1000
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    cls_position: Literal["middle", "head", "none"] = "middle"
    final_pool: Literal["cls", "mean"] = "cls"
    if_divide_out: bool = True

    @property
    def grid(self) -> int:
        """Patches along one side of the image."""
        return (self.img_size - self.patch_size) // self.stride + 1

    @property
    def num_tokens(self) -> int:
        """Patches plus the class token."""
        return self.grid**2 + (self.cls_position != "none")

    @property
    def rank(self) -> int:
        """Input features of dt_proj."""
        return self.dt_rank or math.ceil(self.embed_dim / 16)

    def build(self) -> Vim:
        """A Vim of this architecture with fresh random weights."""
        return Vim(self)


class VimMixer(nn.Module):
    """Two selective scans over the same tokens, one in each direction, summed and projected."""

    def __init__(self, config: VimConfig) -> None:
        super().__init__()
        inner = config.expand * config.embed_dim
        self.rank, self.states = config.rank, config.d_state
        self.if_divide_out = config.if_divide_out
        self.in_proj = nn.Linear(config.embed_dim, 2 * inner, bias=False)
        for suffix in ("", "_b"):
            conv = nn.Conv1d(inner, inner, config.d_conv, groups=inner, padding=config.d_conv - 1)
            x_proj = nn.Linear(inner, self.rank + 2 * self.states, bias=False)
            self.add_module(f"conv1d{suffix}", conv)
            self.add_module(f"x_proj{suffix}", x_proj)
            self.add_module(f"dt_proj{suffix}", _dt_projection(self.rank, inner))
            decay = torch.arange(1, self.states + 1, dtype=torch.float32).log().repeat(inner, 1)
            name = "A_b_log" if suffix else "A_log"
            self.register_parameter(name, nn.Parameter(decay))
            self.register_parameter(f"D{suffix}", nn.Parameter(torch.ones(inner)))
        self.out_proj = nn.Linear(inner, config.embed_dim, bias=False)

    def _direction(self, x: Tensor, z: Tensor, suffix: str) -> Tensor:
        """conv -> x_proj -> dt_proj -> scan for one direction; x, z and the result (B, E, L)."""
        reverse = suffix == "_b"
        conv: nn.Conv1d = getattr(self, f"conv1d{suffix}")
        x_proj: nn.Linear = getattr(self, f"x_proj{suffix}")
        dt_proj: nn.Linear = getattr(self, f"dt_proj{suffix}")
        u = torch.ops.ouro.causal_conv1d(x, conv.weight.squeeze(1), conv.bias, True, reverse)
        delta, B, C = x_proj(u.transpose(1, 2)).split([self.rank, self.states, self.states], dim=-1)
        return torch.ops.ouro.selective_scan(
            u,
            F.linear(delta, dt_proj.weight).transpose(1, 2),
            -torch.exp(getattr(self, "A_b_log" if reverse else "A_log")),
            B.transpose(1, 2),
            C.transpose(1, 2),
            getattr(self, f"D{suffix}"),
            z,
            dt_proj.bias,
            True,
            reverse,
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        x, z = self.in_proj(hidden).transpose(1, 2).chunk(2, dim=1)
        y = self._direction(x, z, "") + self._direction(x, z, "_b")
        if self.if_divide_out:
            y = y / 2
        return self.out_proj(y.transpose(1, 2))


def _dt_projection(rank: int, inner: int) -> nn.Linear:
    """dt_proj with softplus(bias) log-uniform in [1e-3, 1e-1], as in Mamba."""
    linear = nn.Linear(rank, inner)
    nn.init.uniform_(linear.weight, -(rank**-0.5), rank**-0.5)
    step = torch.exp(torch.rand(inner) * math.log(100.0) + math.log(1e-3)).clamp(min=1e-4)
    with torch.no_grad():
        linear.bias.copy_(step + torch.log(-torch.expm1(-step)))  # inverse of softplus
    return linear


class VimNorm(nn.Module):
    """Residual addition and normalisation; layer norm has a bias, RMS norm has none."""

    def __init__(self, config: VimConfig) -> None:
        super().__init__()
        self.rms, self.eps = config.norm == "rms", config.norm_eps
        self.weight = nn.Parameter(torch.ones(config.embed_dim))
        self.register_parameter(
            "bias", None if self.rms else nn.Parameter(torch.zeros(config.embed_dim))
        )

    def forward(self, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """(normalised sum in hidden's dtype, sum in fp32), both (B, L, D)."""
        return torch.ops.ouro.add_norm(
            hidden, residual, self.weight, self.bias, self.eps, self.rms, True
        )


class VimBlock(nn.Module):
    """Add -> norm -> mixer, carrying the residual beside the hidden state."""

    def __init__(self, config: VimConfig) -> None:
        super().__init__()
        self.mixer = VimMixer(config)
        self.norm = VimNorm(config)

    def forward(self, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """(mixer output, residual), both (B, L, D)."""
        normed, residual = self.norm(hidden, residual)
        return self.mixer(normed), residual


class _PatchEmbed(nn.Module):
    def __init__(self, config: VimConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(
            config.in_chans, config.embed_dim, config.patch_size, stride=config.stride
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class Vim(nn.Module):
    """Vision Mamba classifier: images (B, C, H, W) -> logits (B, num_classes)."""

    def __init__(self, config: VimConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = _PatchEmbed(config)
        if config.cls_position != "none":
            self.cls_token = nn.Parameter(torch.empty(1, 1, config.embed_dim))
            nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.pos_embed = nn.Parameter(torch.empty(1, config.num_tokens, config.embed_dim))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.layers = nn.ModuleList(VimBlock(config) for _ in range(config.depth))
        self.norm_f = VimNorm(config)
        self.head = nn.Linear(config.embed_dim, config.num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        with torch.no_grad():  # keep the residual's variance independent of depth
            for name, parameter in self.layers.named_parameters():
                if name.endswith("out_proj.weight"):
                    parameter.div_(math.sqrt(config.depth))

    @property
    def cls_index(self) -> int | None:
        """Position of the class token in the sequence, None without one."""
        positions = {"middle": self.config.grid**2 // 2, "head": 0, "none": None}
        return positions[self.config.cls_position]

    def tokens(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, L, D): patches, class token, positions."""
        size = self.config.img_size
        if images.shape[-2:] != (size, size):
            height, width = images.shape[-2:]
            raise ValueError(f"this Vim takes {size}x{size} images, got {height}x{width}")
        x = self.patch_embed(images)
        at = self.cls_index
        if at is not None:
            cls = self.cls_token.expand(x.shape[0], -1, -1)
            x = torch.cat((x[:, :at], cls, x[:, at:]), dim=1)
        return x + self.pos_embed

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes)."""
        hidden, residual = self.tokens(images), None
        for layer in self.layers:
            hidden, residual = layer(hidden, residual)
        hidden, _ = self.norm_f(hidden, residual)
        # With a class token the public models read it, whatever `final_pool` says.
        at = self.cls_index
        pooled = hidden.mean(1) if at is None else hidden[:, at]
        return self.head(pooled)


_SIZES = {"tiny": 192, "small": 384, "base": 768}


def vim_config(size: Literal["tiny", "small", "base"], *, stride: Literal[16, 8] = 16) -> VimConfig:
    """Architecture of the public Vim-T / S / B checkpoints; stride 8 gives 730 tokens."""
    return VimConfig(embed_dim=_SIZES[size], stride=stride)


# What `examples/vim_digits.safetensors` is: 28x28 grey images, 7x7 patches of 4x4 pixels.
VIM_MICRO = VimConfig(
    img_size=28, patch_size=4, stride=4, in_chans=1, embed_dim=48, depth=4, num_classes=10
)

# Names that `--arch` and a file's metadata use.
ARCHITECTURES: dict[str, VimConfig] = {
    "vim_micro": VIM_MICRO,
    **{f"vim_{size}": vim_config(size) for size in ("tiny", "small", "base")},
    **{f"vim_{size}_stride8": vim_config(size, stride=8) for size in ("tiny", "small", "base")},
}


def _factory(name: str) -> Callable[..., Vim]:
    def build(**overrides: object) -> Vim:
        return replace(ARCHITECTURES[name], **overrides).build()  # type: ignore[arg-type]

    build.__name__ = name
    build.__doc__ = f"A `{name}` with random weights; keyword arguments override VimConfig fields."
    return build


vim_micro = _factory("vim_micro")
vim_tiny = _factory("vim_tiny")
vim_small = _factory("vim_small")
vim_base = _factory("vim_base")
