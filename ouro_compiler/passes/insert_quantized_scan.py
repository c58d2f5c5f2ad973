"""insert_quantized_scan: the quantizers inside a scan's recurrence (METHODS 3.6, 7, 8).

1. A selective_scan whose layer is in `ctx.calibration.scans` becomes softplus (where the scan had
it; delta_bias is added first) and `quantized_selective_scan`; `step` quantizes what softplus gives.
2. With `output` or `gate` the scan's D and z move behind it: y, quantized by `output`, plus D u,
times silu(z), quantized by `gate`.
3. Everything else about the scan stays, its layer's name included.

Scans that calibration has no parameters for are left alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from ouro_compiler.graph import (
    ScanParams,
    UniformParams,
    all_arguments,
    aten,
    insert_call,
    is_op,
    replace_node,
)
from ouro_compiler.passes.base import PassContext
from ouro_compiler.passes.quantized_parts import constant

_SCAN = torch.ops.ouro.selective_scan.default
_QUANTIZED = torch.ops.ouro.quantized_selective_scan.default
_FAKE_QUANTIZE = torch.ops.ouro.fake_quantize.default


def insert_quantized_scan(gm: fx.GraphModule, ctx: PassContext) -> bool:
    """Replace every scan that has parameters; False if all of them already are."""
    modified = False
    for layer, params in ctx.calibration.scans.items():
        scan = ctx.layers[layer]
        if is_op(scan, _SCAN) and scan in gm.graph.nodes:
            _Inserter(gm, scan, layer, params).replace()
            modified = True
    return modified


class _Inserter:
    """Builds what replaces one scan, right before it."""

    def __init__(self, gm: fx.GraphModule, scan: fx.Node, layer: str, params: ScanParams) -> None:
        self.gm, self.scan, self.layer, self.params = gm, scan, layer, params

    def replace(self) -> None:
        params = self.params
        u, delta, A, B, C, D, z, delta_bias, softplus, reverse = all_arguments(self.scan)
        step = self._step(delta, delta_bias, softplus)
        behind = params.output is not None or params.gate is not None
        y = self._call(
            _QUANTIZED,
            *(u, step, A, B, C),
            *((None, None) if behind else (D, z)),
            *(self._vector(name) for name in ("decay_scale", "input_scale", "input_threshold")),
            *(self._vector(name) for name in ("state_scale", "state_threshold", "state_factor")),
            *(params.decay_limit, params.decay_steps, params.bits, params.outlier_bits),
            *(params.refresh_period, params.output_before_rounding, reverse),
        )
        y.meta["ouro_layer"] = self.layer
        if behind:
            y = self._behind(y, u, D, z)
        replace_node(self.scan, y)

    def _step(self, delta: fx.Node, bias: fx.Node | None, softplus: bool) -> fx.Node:
        step = delta
        if bias is not None:
            step = self._call(aten.add.Tensor, step, self._call(aten.unsqueeze.default, bias, 1))
        if softplus:
            step = self._call(aten.softplus.default, step)
        return self._quantized(step, "step", self.params.step)

    def _behind(self, y: fx.Node, u: fx.Node, D: fx.Node | None, z: fx.Node | None) -> fx.Node:
        y = self._quantized(y, "output", self.params.output)
        if D is not None:
            skip = self._call(aten.mul.Tensor, u, self._call(aten.unsqueeze.default, D, 1))
            y = self._call(aten.add.Tensor, y, skip)
        if z is not None:
            gate = self._call(aten.silu.default, z)
            y = self._call(aten.mul.Tensor, y, self._quantized(gate, "gate", self.params.gate))
        return y

    def _quantized(self, x: fx.Node, name: str, params: UniformParams | None) -> fx.Node:
        if params is None:
            return x
        smooth = None
        if params.smooth is not None:
            smooth = self._constant(f"{name}.smooth", params.smooth)
            x = self._call(aten.div.Tensor, x, smooth)
        scale = self._constant(f"{name}.scale", params.scale)
        zero = params.zero_point
        zero_point = None if zero is None else self._constant(f"{name}.zero_point", zero)
        x = self._call(_FAKE_QUANTIZE, x, scale, zero_point, self.params.bits)
        return x if smooth is None else self._call(aten.mul.Tensor, x, smooth)

    def _vector(self, name: str) -> fx.Node | None:
        value: Tensor | None = getattr(self.params, name)
        return None if value is None else self._constant(name, value)

    def _constant(self, name: str, value: Tensor) -> fx.Node:
        return constant(self.gm, self.scan, f"{self.layer}.{name}", value)

    def _call(self, target: Any, *args: Any) -> fx.Node:
        return insert_call(self.gm.graph, self.scan, target, *args)
