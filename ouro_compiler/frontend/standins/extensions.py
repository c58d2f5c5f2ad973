"""What stands in for the CUDA extensions `selective_scan_cuda*` and `causal_conv1d*`.

Each module's names call the ops of this project, with the extension's own arguments.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import ouro_compiler.ops  # noqa: F401  (registers torch.ops.ouro)
from ouro_compiler.frontend.standins.refusals import (
    final_state,
    refuse_given,
    refuse_training,
    refusing,
)

_BACKWARD = "it has no backward pass; run the model under torch.no_grad()"
_STEP = "one token at a time (inference_params) is not supported"


def _scan_forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> list[Tensor]:
    """mamba's: (output, states), and the gated output where there is a gate."""
    y = torch.ops.ouro.selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    states = final_state(u, A)
    return [y, states] if z is None else [y, states, y]


def _scan_forward_oflex(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    nrows: int,
    out_float: bool = True,
) -> list[Tensor]:
    """VMamba's: no gate, and an fp32 output if `out_float`; nrows is a choice of its kernel."""
    del nrows
    y = torch.ops.ouro.selective_scan(u, delta, A, B, C, D, None, delta_bias, delta_softplus)
    return [y.float() if out_float else y, final_state(u, A)]


def _scan_forward_core(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    nrows: int,
) -> list[Tensor]:
    return _scan_forward_oflex(u, delta, A, B, C, D, delta_bias, delta_softplus, nrows, False)


def _conv_forward(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    """(x, weight, bias, states ..., silu): versions differ in how many states there are."""
    *states, silu = rest
    refuse_given("causal_conv1d", **{f"state {i}": state for i, state in enumerate(states)})
    return torch.ops.ouro.causal_conv1d(x, weight, bias, bool(silu))


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """`causal_conv1d.causal_conv1d_fn`: x (B, D, L), weight (D, W), activation None or silu."""
    refuse_training("causal_conv1d_fn", x, weight, bias)
    refuse_given(
        "causal_conv1d_fn",
        seq_idx=seq_idx,
        initial_states=initial_states,
        return_final_states=return_final_states,
        final_states_out=final_states_out,
    )
    return torch.ops.ouro.causal_conv1d(x, weight, bias, is_silu(activation))


def is_silu(activation: str | bool | None) -> bool:
    """causal_conv1d's way to ask for SiLU. Raises ValueError for another activation."""
    if activation not in (None, False, True, "silu", "swish"):
        raise ValueError(f"causal_conv1d: activation must be silu or None, got {activation!r}")
    return bool(activation)


def _scan_module(forward: Any) -> dict[str, Any]:
    return {"fwd": forward, "bwd": refusing("selective_scan", _BACKWARD)}


_CONV_UPDATE = refusing("causal_conv1d_update", _STEP)
_CONV_BACKWARD = refusing("causal_conv1d", _BACKWARD)

EXTENSIONS: dict[str, dict[str, Any]] = {
    "selective_scan_cuda": _scan_module(_scan_forward),
    "selective_scan_cuda_oflex": _scan_module(_scan_forward_oflex),
    "selective_scan_cuda_core": _scan_module(_scan_forward_core),
    "causal_conv1d_cuda": {
        "causal_conv1d_fwd": _conv_forward,
        "causal_conv1d_bwd": _CONV_BACKWARD,
        "causal_conv1d_update": _CONV_UPDATE,
    },
    "causal_conv1d": {
        "__version__": "1.6.0",
        "causal_conv1d_fn": causal_conv1d_fn,
        "causal_conv1d_update": _CONV_UPDATE,
    },
    "causal_conv1d.cpp_functions": {
        "causal_conv1d_fwd_function": _conv_forward,
        "causal_conv1d_bwd_function": _CONV_BACKWARD,
        "causal_conv1d_update_function": _CONV_UPDATE,
    },
    "causal_conv1d.causal_conv1d_interface": {
        "causal_conv1d_fn": causal_conv1d_fn,
        "causal_conv1d_update": _CONV_UPDATE,
    },
    "causal_conv1d.causal_conv1d_varlen": {
        "causal_conv1d_varlen_states": refusing("causal_conv1d_varlen_states", _STEP),
    },
}
