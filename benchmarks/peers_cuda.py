"""mamba_ssm's and causal_conv1d's own CUDA kernels as `ouro` operators (benchmarks/peers_build.py).

Their modules are used directly, without the Python around them. They scan and convolve forwards,
over memory laid out as (B, D, L): other directions are flipped and other layouts copied, as the
packages' own functions do, and that is part of their time.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor

from benchmarks.peers import UnavailableError
from ouro_compiler.frontend.standins.modules import is_stand_in


def cuda_kernels() -> dict[str, Callable[..., Tensor]]:
    """`ouro` operators by name. Raises UnavailableError."""
    return {
        "selective_scan": _scan_by(_module("selective_scan_cuda")),
        "causal_conv1d": _convolution_by(_module("causal_conv1d_cuda")),
    }


def _module(name: str) -> Any:
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        reason = (str(error).splitlines() or ["no message"])[0]
        raise UnavailableError(f"{name} cannot be imported: {reason[:120]}") from error
    if is_stand_in(module):
        raise UnavailableError(f"{name} cannot be imported: a stand-in is in its place")
    return module


def _scan_by(module: Any) -> Callable[..., Tensor]:
    def selective_scan(
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = False,
        reverse: bool = False,
    ) -> Tensor:
        B, C = (one[:, None] if one.dim() == 3 else one for one in (B, C))
        u, delta, B, C = (_rows(one.to(u.dtype), reverse) for one in (u, delta, B, C))
        z = None if z is None else _rows(z.to(u.dtype), reverse)
        D, delta_bias = (None if one is None else one.float() for one in (D, delta_bias))
        # (y, states), and with a gate the gated y behind them
        results = module.fwd(u, delta, A.float(), B, C, D, z, delta_bias, delta_softplus)
        y = results[0] if z is None else results[2]
        return y.flip(-1) if reverse else y

    return selective_scan


def _convolution_by(module: Any) -> Callable[..., Tensor]:
    def causal_conv1d(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        silu: bool = False,
        reverse: bool = False,
    ) -> Tensor:
        x = x.flip(-1) if reverse else x
        # Its form for channels side by side wants strides of multiples of 8.
        side_by_side = x.stride(1) == 1 and x.shape[1] % 8 == 0
        aligned = x.stride(2) % 8 == 0 and x.stride(0) % 8 == 0
        x = x if side_by_side and aligned else _rows(x, False)
        y = x.new_empty(x.shape) if x.stride(2) == 1 else _like(x)
        module.causal_conv1d_fwd(x, weight.contiguous(), bias, None, None, y, None, silu)
        return y.flip(-1) if reverse else y

    return causal_conv1d


def _rows(x: Tensor, reverse: bool) -> Tensor:
    """x, reversed if asked for, with its last dimension contiguous."""
    x = x.flip(-1) if reverse else x
    return x if x.stride(-1) == 1 else x.contiguous()


def _like(x: Tensor) -> Tensor:
    """New memory (B, L, D) for x (B, D, L)."""
    return x.new_empty((x.shape[0], x.shape[2], x.shape[1])).transpose(1, 2)
