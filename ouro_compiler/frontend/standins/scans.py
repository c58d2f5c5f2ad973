"""Scans and whole mixers that public code writes by hand, on the ops of this project."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import ouro_compiler.ops  # noqa: F401  (registers torch.ops.ouro)
from ouro_compiler.frontend.standins.extensions import is_silu


def scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    oflex: bool = False,
) -> Tensor:
    """One selective scan; with `oflex` (VMamba) the output is fp32 whatever u is."""
    y = torch.ops.ouro.selective_scan(u, delta, A, B, C, D, z, delta_bias, bool(delta_softplus))
    return y.float() if oflex else y


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """A causal depthwise convolution: x (B, D, L), weight (D, W)."""
    return torch.ops.ouro.causal_conv1d(x, weight, bias, is_silu(activation))


def mixer(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    A: Tensor,
    out_proj_weight: Tensor | None = None,
    out_proj_bias: Tensor | None = None,
    A_b: Tensor | None = None,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> Tensor:
    """What mamba's fused functions do between in_proj and out_proj: xz (B, 2 D, L).

    Returns (B, L, O) with `out_proj_weight`, else (B, D, L). With `A_b` the tokens are scanned in
    reverse too, from the same projections, and the two are added.
    """
    x, z = xz.chunk(2, dim=1)
    x = causal_conv(x, conv1d_weight.squeeze(1), conv1d_bias, "silu")
    rank, states = delta_proj_weight.shape[1], A.shape[1]
    parts = F.linear(x.transpose(1, 2), x_proj_weight).split([rank, states, states], dim=-1)
    delta = F.linear(parts[0], delta_proj_weight).transpose(1, 2)
    B = _operand(parts[1], B_proj_bias) if B is None else B
    C = _operand(parts[2], C_proj_bias) if C is None else C
    rest = (D, z, delta_bias, delta_softplus)
    y = torch.ops.ouro.selective_scan(x, delta, A, B, C, *rest, False)
    if A_b is not None:
        y = y + torch.ops.ouro.selective_scan(x, delta, A_b, B, C, *rest, True)
    if out_proj_weight is None:
        return y
    return F.linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)


def _operand(part: Tensor, bias: Tensor | None) -> Tensor:
    """(B, L, N) -> (B, N, L)."""
    return (part if bias is None else part + bias.to(part.dtype)).transpose(1, 2)
