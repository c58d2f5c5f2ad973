"""Translations of the selective scans: one ONNX Scan, or one com.microsoft LinearAttention.

The Scan walks L steps of six nodes over a state (B, D, N), or (B, G, D/G, N) where B and C come in
groups; a reversed scan has reversed directions of inputs and output, and nothing is flipped.
LinearAttention computes the same recurrence with a head for each channel: update rule "gated",
query C, key B, value Delta u and decay Delta A, its state (N, 1) a head.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import fx

from ouro_compiler.errors import ModelError
from ouro_compiler.export.emitter import CONTRIB, Emitter, static, translates
from ouro_compiler.export.quantizers import dequantize
from ouro_compiler.export.views import flipped
from ouro_compiler.graph import argument, value_of
from ouro_compiler.ops.chunked_scan import groups_of

_OURO = torch.ops.ouro


@dataclass(frozen=True)
class _Operands:
    """What a scan reads, in fp32: u and delta (B, D, L), B and C (B, G, N, L) or (B, N, L)."""

    u: str
    delta: str
    B: str
    C: str
    groups: int
    grouped: tuple[bool, bool]  # do B and C have four dimensions?


@translates(_OURO.selective_scan.default)
def _selective_scan(emit: Emitter, node: fx.Node) -> str:
    B, C = argument(node, "B"), argument(node, "C")
    u, delta = _sequence(emit, node), emit.real(argument(node, "delta"))
    ranks = value_of(B).dim() == 4, value_of(C).dim() == 4
    groups = int(groups_of(value_of(B)))
    given = _Operands(u, delta, emit.real(B), emit.real(C), groups, ranks)
    return _translated(emit, node, given)


@translates(_OURO.selective_scan_dynamic_outlier.default)
def _selective_scan_dynamic_outlier(emit: Emitter, node: fx.Node) -> str:
    def turned(name: str) -> str:
        return emit.op("Transpose", dequantize(emit, node, argument(node, name)), perm=[0, 2, 1])

    A, (codes, *_) = argument(node, "A"), argument(node, "B")
    length = int(value_of(node).shape[2])
    states = int(value_of(A).shape[1])
    groups = int(value_of(codes).shape[2]) // states
    delta, B, C = (turned(name) for name in ("delta", "B", "C"))
    if groups > 1:
        shape = emit.integers(0, groups, states, length)
        B, C = (emit.op("Reshape", one, shape) for one in (B, C))
    u = _sequence(emit, node)
    return _translated(emit, node, _Operands(u, delta, B, C, groups, (groups > 1, groups > 1)))


def _sequence(emit: Emitter, node: fx.Node) -> str:
    """u fp32 (B, D, L), which a scan also takes as a map."""
    u, shape = argument(node, "u"), value_of(node).shape
    made = emit.real(u)
    if value_of(u).dim() == 3:
        return made
    return emit.op("Reshape", made, emit.integers(0, int(shape[1]), int(shape[2])))


def _translated(emit: Emitter, node: fx.Node, given: _Operands) -> str:
    if value_of(node).dtype == torch.float64:
        raise ModelError(f"{node.name}: ONNX export has scans in fp32 only")
    u, delta = given.u, given.delta
    bias = argument(node, "delta_bias")
    if bias is not None:
        delta = emit.op("Add", delta, emit.column(bias))
    if argument(node, "delta_softplus"):
        delta = emit.op("Softplus", delta)
    shape = [static(one) for one in value_of(argument(node, "A")).shape]
    sizes = [int(one) for one in shape if one is not None]
    form = _attention if emit.scan == "contrib" else _scan
    y = form(emit, node, replace(given, delta=delta), *sizes)
    skip, gate = argument(node, "D"), argument(node, "z")
    if skip is not None:
        y = emit.op("Add", y, emit.op("Mul", u, emit.column(skip)))
    if gate is not None:
        z = emit.real(gate)
        y = emit.op("Mul", y, emit.op("Mul", z, emit.op("Sigmoid", z)))
    dtype = value_of(node).dtype
    return y if dtype == torch.float32 else emit.cast(y, dtype)


def _column(emit: Emitter, vector: str) -> str:
    return emit.op("Unsqueeze", vector, emit.integers(-1))


def _scan(emit: Emitter, node: fx.Node, given: _Operands, channels: int, states: int) -> str:
    from onnx import helper

    u, delta, groups = given.u, given.delta, given.groups

    # Per step: a column of Delta and of Delta u, a row of B, a column of C.
    inner = (channels,) if groups == 1 else (groups, channels // groups)
    rank = len(inner) + 1  # of a step's operands without their last or last but one dimension
    moment = emit.op("Mul", delta, u)
    columns = [_steps(emit, one, inner) for one in (delta, moment)]
    rows, outs = given.B, given.C
    if groups == 1 and given.grouped[0]:
        rows = emit.op("Squeeze", rows, emit.integers(1))
    if groups == 1 and given.grouped[1]:
        outs = emit.op("Squeeze", outs, emit.integers(1))
    rows = emit.op("Unsqueeze", rows, emit.integers(rank - 1))
    outs = emit.op("Unsqueeze", outs, emit.integers(rank))
    A = emit.real(argument(node, "A"))
    if groups > 1:
        A = emit.op("Reshape", A, emit.integers(*inner, states))
    batch = emit.op("Shape", u, start=0, end=1)
    state_shape = emit.op("Concat", batch, emit.integers(*inner, states), axis=0)
    zero = helper.make_tensor("value", 1, [1], [0.0])
    start = emit.op("ConstantOfShape", state_shape, value=zero)
    scope = f"{emit.prefix}/step"
    names = {one: f"{scope}/{one}" for one in ("h", "dt", "dx", "b", "c", "next", "y")}
    body = emit.body(
        [
            helper.make_node("Mul", [names["dt"], A], [f"{scope}/exponent"]),
            helper.make_node("Exp", [f"{scope}/exponent"], [f"{scope}/decay"]),
            helper.make_node("Mul", [f"{scope}/decay", names["h"]], [f"{scope}/kept"]),
            helper.make_node("Mul", [names["dx"], names["b"]], [f"{scope}/added"]),
            helper.make_node("Add", [f"{scope}/kept", f"{scope}/added"], [names["next"]]),
            helper.make_node("MatMul", [names["next"], names["c"]], [names["y"]]),
        ],
        [
            (names["h"], ["batch", *inner, states]),
            (names["dt"], ["batch", *inner, 1]),
            (names["dx"], ["batch", *inner, 1]),
            (names["b"], ["batch", *inner[:-1], 1, states]),
            (names["c"], ["batch", *inner[:-1], states, 1]),
        ],
        [(names["next"], ["batch", *inner, states]), (names["y"], ["batch", *inner, 1])],
    )
    backwards = int(argument(node, "reverse"))
    axes = [rank, rank, rank + 1, rank + 1]
    _, y = emit.multi(
        "Scan",
        [start, *columns, rows, outs],
        2,
        body=body,
        num_scan_inputs=4,
        scan_input_axes=axes,
        scan_input_directions=[backwards] * 4,
        scan_output_axes=[rank],
        scan_output_directions=[backwards],
    )
    return emit.op("Reshape", y, emit.integers(0, channels, int(value_of(node).shape[2])))


def _steps(emit: Emitter, name: str, inner: tuple[int, ...]) -> str:
    """(B, D, L) -> (B, D, L, 1), or (B, G, D/G, L, 1)."""
    if len(inner) == 1:
        return _column(emit, name)
    return emit.op("Reshape", name, emit.integers(0, *inner, -1, 1))


def _attention(emit: Emitter, node: fx.Node, given: _Operands, channels: int, states: int) -> str:
    backwards, groups = argument(node, "reverse"), given.groups

    def tokens(name: str) -> str:
        """(B, D, L) -> (B, L, D), in scan order."""
        turned = emit.op("Transpose", name, perm=[0, 2, 1])
        return flipped(emit, turned, 1) if backwards else turned

    def grouped(matrix: str) -> str:
        """(B, N, L) or (B, G, N, L) -> (B, L, G N)."""
        length = int(value_of(node).shape[2])
        return tokens(emit.op("Reshape", matrix, emit.integers(0, groups * states, length)))

    step = tokens(given.delta)
    value = emit.op("Mul", step, tokens(given.u))
    exponent = emit.op("Mul", _column(emit, step), emit.real(argument(node, "A")))
    decay = emit.op("Reshape", exponent, emit.integers(0, 0, channels * states))
    key = emit.op("Reshape", grouped(given.B), emit.integers(0, 0, groups, 1, states))
    key = emit.op("Tile", key, emit.integers(1, 1, 1, channels // groups, 1))
    key = emit.op("Reshape", key, emit.integers(0, 0, channels * states))
    y, _ = emit.multi(
        "LinearAttention",
        [grouped(given.C), key, value, None, decay],
        2,
        domain=CONTRIB,
        q_num_heads=groups,
        kv_num_heads=channels,
        scale=1.0,
        update_rule="gated",
    )
    y = flipped(emit, y, 1) if backwards else y
    return emit.op("Transpose", y, perm=[0, 2, 1])
