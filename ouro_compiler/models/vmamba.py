"""VMamba (arXiv 2401.10166): hierarchical, every block scans the map of tokens in four orders.

The state_dict keys are those of the public checkpoints (`layers.N.blocks.M.op.x_proj_weight`, ...),
so that a public checkpoint loads strictly: `v05_noz` models (82.6 to 83.9 %) and the earlier `v0`
ones with a gate. Tokens are (B, L, C) in raster order everywhere, so each linear is a site with the
L of its stage; the public code's channel-first and channel-last forms have the same weights.

Four scans a block, not one of four groups: order k reads row-major (k even) or column-major tokens,
forwards (k < 2) or, by the scan's `reverse` flag, backwards. Directions 0 and 2 then read one
tensor, as do 1 and 3; nothing is flipped or stacked. Each x_proj and dt_proj is a linear of its own
whose time runs in its scan's order, and each scan's delta, B and C get their own scale per time
step. One scan of four groups would share these scales between pixels that have nothing in common,
because step t is another pixel in every order.
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
from ouro_compiler.models.layers import Mlp, fresh_dt_bias

DIRECTIONS = 4
Grid = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class VMambaConfig:
    """Everything that fixes a VMamba's architecture; lengths in pixels or channels.

    Stage s has embed_dim * 2**s channels and depths[s] blocks. gate: the block's input is projected
    to x and z, and z gates the result. mlp_ratio 0: no MLP. patch_embed: "v1" one convolution of
    patch_size squared pixels, "v2" two overlapping ones, whose patch_size is 4. downsample: "v1"
    merges 2x2 tokens by a linear, "v2" is a 2x2 convolution, "v3" an overlapping one of 3x3.
    """

    img_size: int = 224
    patch_size: int = 4
    in_chans: int = 3
    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 2, 8, 2)
    d_state: int = 1
    d_conv: int = 3
    ssm_ratio: float = 1.0
    conv_bias: bool = False
    gate: bool = False
    mlp_ratio: float = 4.0
    patch_embed: Literal["v1", "v2"] = "v2"
    downsample: Literal["v1", "v2", "v3"] = "v3"
    num_classes: int = 1000

    def dim(self, stage: int) -> int:
        """Channels of a stage's tokens."""
        return self.embed_dim * 2**stage

    def build(self) -> VMamba:
        """A VMamba of this architecture with fresh random weights."""
        return VMamba(self)


def _as_map(tokens: Tensor, grid: Grid) -> Tensor:
    """(B, L, C) -> (B, C, H, W)."""
    return tokens.transpose(1, 2).unflatten(2, grid)


def _as_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, L, C)."""
    return x.flatten(2).transpose(1, 2)


class SS2D(nn.Module):
    """in_proj -> depthwise convolution -> four scans -> their sum -> norm -> out_proj."""

    def __init__(self, config: VMambaConfig, dim: int) -> None:
        super().__init__()
        inner, rank = round(config.ssm_ratio * dim), math.ceil(dim / 16)
        self.parts, self.gate = (rank, config.d_state, config.d_state), config.gate
        self.in_proj = nn.Linear(dim, inner * (1 + config.gate), bias=False)
        self.conv2d = nn.Conv2d(
            inner, inner, config.d_conv, groups=inner, padding="same", bias=config.conv_bias
        )
        bound = inner**-0.5  # as nn.Linear draws its weight
        self.x_proj_weight = nn.Parameter(
            torch.empty(DIRECTIONS, sum(self.parts), inner).uniform_(-bound, bound)
        )
        bound = rank**-0.5
        self.dt_projs_weight = nn.Parameter(
            torch.empty(DIRECTIONS, inner, rank).uniform_(-bound, bound)
        )
        self.dt_projs_bias = nn.Parameter(fresh_dt_bias(DIRECTIONS, inner))
        decay = torch.arange(1, config.d_state + 1, dtype=torch.float32).log()
        self.A_logs = nn.Parameter(decay.repeat(DIRECTIONS * inner, 1))
        self.Ds = nn.Parameter(torch.ones(DIRECTIONS * inner))
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def _direction(self, u: Tensor, tokens: Tensor, order: int) -> Tensor:
        """x_proj -> dt_proj -> scan in one order; u (B, E, L), tokens (B, L, E), y (B, E, L)."""
        x_dbl = F.linear(tokens, self.x_proj_weight[order])
        delta, B, C = x_dbl.split(self.parts, dim=-1)
        return torch.ops.ouro.selective_scan(
            u,
            F.linear(delta, self.dt_projs_weight[order]).transpose(1, 2),
            -torch.exp(self.A_logs.unflatten(0, (DIRECTIONS, -1))[order]),
            B.transpose(1, 2),
            C.transpose(1, 2),
            self.Ds.unflatten(0, (DIRECTIONS, -1))[order],
            None,
            self.dt_projs_bias[order],
            True,
            order >= 2,
        )

    def forward(self, hidden: Tensor, grid: Grid) -> Tensor:
        """(B, L, D) -> (B, L, D), L = H*W in raster order."""
        x = self.in_proj(hidden)
        z = None
        if self.gate:
            x, z = x.chunk(2, dim=-1)
        u = F.silu(self.conv2d(_as_map(x, grid)))
        orders = (u.flatten(2), u.transpose(2, 3).flatten(2))
        tokens = [one.transpose(1, 2) for one in orders]
        y = [self._direction(orders[k % 2], tokens[k % 2], k) for k in range(DIRECTIONS)]
        columns = (y[1] + y[3]).unflatten(2, grid[::-1]).transpose(2, 3).flatten(2)
        merged = self.out_norm((y[0] + y[2] + columns).transpose(1, 2))
        return self.out_proj(merged if z is None else merged * F.silu(z))


class VSSBlock(nn.Module):
    """Residual branches: norm -> scans, and norm -> MLP where there is one."""

    def __init__(self, config: VMambaConfig, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.op = SS2D(config, dim)
        self.with_mlp = config.mlp_ratio > 0
        if self.with_mlp:
            self.norm2 = nn.LayerNorm(dim)
            self.mlp = Mlp(dim, round(config.mlp_ratio * dim))

    def forward(self, hidden: Tensor, grid: Grid) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        hidden = hidden + self.op(self.norm(hidden), grid)
        return hidden + self.mlp(self.norm2(hidden)) if self.with_mlp else hidden


class PatchEmbed(nn.Module):
    """Images to tokens; members are numbered as in the public Sequential."""

    def __init__(self, config: VMambaConfig) -> None:
        super().__init__()
        dim, half = config.embed_dim, config.embed_dim // 2
        self.overlapping = config.patch_embed == "v2"
        if self.overlapping:
            self.add_module("0", nn.Conv2d(config.in_chans, half, 3, stride=2, padding=1))
            self.add_module("2", nn.LayerNorm(half))
            self.add_module("5", nn.Conv2d(half, dim, 3, stride=2, padding=1))
            self.add_module("7", nn.LayerNorm(dim))
        else:
            size = config.patch_size
            self.add_module("0", nn.Conv2d(config.in_chans, dim, size, stride=size))
            self.add_module("2", nn.LayerNorm(dim))

    def forward(self, images: Tensor) -> tuple[Tensor, Grid]:
        """(B, 3, H, W) -> tokens (B, H/P * W/P, C), and how many there are along each side."""
        x = self.get_submodule("0")(images)
        tokens = self.get_submodule("2")(_as_tokens(x))
        if self.overlapping:
            half: Grid = (x.shape[2], x.shape[3])
            x = self.get_submodule("5")(_as_map(F.gelu(tokens), half))
            tokens = self.get_submodule("7")(_as_tokens(x))
        return tokens, (x.shape[2], x.shape[3])


class PatchMerging(nn.Module):
    """Halve each side of the map: 2x2 tokens side by side, a norm, a linear."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(4 * dim)

    def forward(self, tokens: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        """(B, L, C) -> (B, L/4, 2C); an odd side gets a row or column of zeros."""
        x = tokens.unflatten(1, grid)
        if grid[0] % 2 or grid[1] % 2:
            x = F.pad(x, (0, 0, 0, grid[1] % 2, 0, grid[0] % 2))
        corners = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        merged = self.reduction(self.norm(torch.cat(corners, dim=-1).flatten(1, 2)))
        return merged, ((grid[0] + 1) // 2, (grid[1] + 1) // 2)


class Downsample(nn.Module):
    """Halve each side of the map by a convolution; members are numbered as in public code."""

    def __init__(self, dim: int, *, overlapping: bool) -> None:
        super().__init__()
        size, padding = (3, 1) if overlapping else (2, 0)
        self.add_module("1", nn.Conv2d(dim, 2 * dim, size, stride=2, padding=padding))
        self.add_module("3", nn.LayerNorm(2 * dim))

    def forward(self, tokens: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        """(B, L, C) -> (B, L/4, 2C)."""
        x = self.get_submodule("1")(_as_map(tokens, grid))
        return self.get_submodule("3")(_as_tokens(x)), (x.shape[2], x.shape[3])


class _Stage(nn.Module):
    def __init__(self, config: VMambaConfig, stage: int) -> None:
        super().__init__()
        dim = config.dim(stage)
        self.blocks = nn.ModuleList(VSSBlock(config, dim) for _ in range(config.depths[stage]))
        self.downsample: PatchMerging | Downsample | None = None
        if stage < len(config.depths) - 1:
            self.downsample = (
                PatchMerging(dim)
                if config.downsample == "v1"
                else Downsample(dim, overlapping=config.downsample == "v3")
            )

    def forward(self, tokens: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        for block in self.blocks:
            tokens = block(tokens, grid)
        return (tokens, grid) if self.downsample is None else self.downsample(tokens, grid)


class VMamba(nn.Module):
    """VMamba classifier: images (B, C, H, W) -> logits (B, num_classes). No size is fixed."""

    def __init__(self, config: VMambaConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.layers = nn.ModuleList(_Stage(config, stage) for stage in range(len(config.depths)))
        width = config.dim(len(config.depths) - 1)
        self.classifier = nn.ModuleDict(
            {"norm": nn.LayerNorm(width), "head": nn.Linear(width, config.num_classes)}
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes)."""
        tokens, grid = self.patch_embed(images)
        for layer in self.layers:
            tokens, grid = layer(tokens, grid)
        return self.classifier["head"](self.classifier["norm"](tokens).mean(1))


_VANILLA = VMambaConfig(
    d_state=16, ssm_ratio=2.0, conv_bias=True, gate=True, mlp_ratio=0.0,
    patch_embed="v1", downsample="v1", depths=(2, 2, 27, 2),
)  # fmt: skip


def _sized(base: VMambaConfig, embed_dim: int, blocks: int, ratio: float) -> VMambaConfig:
    return replace(base, embed_dim=embed_dim, depths=(2, 2, blocks, 2), ssm_ratio=ratio)


# What `examples/vmamba_digits.safetensors` is: 28x28 grey images, 14x14 tokens, then 7x7.
VMAMBA_MICRO = VMambaConfig(
    img_size=28, patch_size=2, in_chans=1, embed_dim=32, depths=(2, 2), ssm_ratio=2.0,
    patch_embed="v1", num_classes=10,
)  # fmt: skip

# Public names: s is ssm_ratio, l the blocks of the third stage; "v0" are the first models.
ARCHITECTURES: dict[str, VMambaConfig] = {
    "vmamba_micro": VMAMBA_MICRO,
    "vmamba_tiny_s1l8": _sized(VMambaConfig(), 96, 8, 1.0),
    "vmamba_small_s1l20": _sized(VMambaConfig(), 96, 20, 1.0),
    "vmamba_base_s1l20": _sized(VMambaConfig(), 128, 20, 1.0),
    "vmamba_tiny_s2l5": _sized(VMambaConfig(), 96, 5, 2.0),
    "vmamba_small_s2l15": _sized(VMambaConfig(), 96, 15, 2.0),
    "vmamba_base_s2l15": _sized(VMambaConfig(), 128, 15, 2.0),
    "vmamba_tiny_v0": _sized(_VANILLA, 96, 9, 2.0),
    "vmamba_small_v0": _sized(_VANILLA, 96, 27, 2.0),
    "vmamba_base_v0": _sized(_VANILLA, 128, 27, 2.0),
}


def _factory(name: str) -> Callable[..., VMamba]:
    def build(**overrides: object) -> VMamba:
        return replace(ARCHITECTURES[name], **overrides).build()  # type: ignore[arg-type]

    build.__name__ = name
    build.__doc__ = f"A `{name}` with random weights; keywords override VMambaConfig fields."
    return build


vmamba_micro = _factory("vmamba_micro")
vmamba_tiny = _factory("vmamba_tiny_s1l8")
vmamba_small = _factory("vmamba_small_s2l15")
vmamba_base = _factory("vmamba_base_s2l15")
