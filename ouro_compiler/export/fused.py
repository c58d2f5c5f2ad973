"""Translations of norms, depthwise convolutions and gates, alone or ending in a quantizer."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from ouro_compiler.export.emitter import Emitter, Translated, translates
from ouro_compiler.export.layers import rms_norm
from ouro_compiler.export.quantizers import quantize
from ouro_compiler.export.views import flipped
from ouro_compiler.graph import argument, value_of
from ouro_compiler.ops.norm import residual_dtype

_OURO = torch.ops.ouro


@translates(_OURO.add_norm.default)
def _add_norm(emit: Emitter, node: fx.Node) -> Translated:
    y, total = _normalised(emit, node)
    return _in_dtype(emit, y, value_of(node)[0]), total


@translates(_OURO.add_norm_quantize.default)
def _add_norm_quantize(emit: Emitter, node: fx.Node) -> Translated:
    y, total = _normalised(emit, node)
    x = value_of(argument(node, "x"))
    y = _in_dtype(emit, y, x)
    return (*quantize(emit, node, _as_float(emit, y, x), x.shape), y, total)


def _normalised(emit: Emitter, node: fx.Node) -> tuple[str, str]:
    """(the norm in fp32, x + residual in its dtype)."""
    x, residual = argument(node, "x"), argument(node, "residual")
    total = emit.real(x)
    if residual is not None:
        total = emit.op("Add", total, emit.real(residual))
    y = _norm(emit, node, total)
    dtype = residual_dtype(
        value_of(x),
        None if residual is None else value_of(residual),
        argument(node, "residual_fp32"),
    )
    return y, total if dtype == torch.float32 else emit.cast(total, dtype)


def _norm(emit: Emitter, node: fx.Node, x: str) -> str:
    """x fp32 (..., K) normalised as a node's arguments say."""
    weight, bias = emit.real(argument(node, "weight")), argument(node, "bias")
    eps = argument(node, "eps")
    if argument(node, "rms"):
        y = rms_norm(emit, x, weight, eps, [-1])
        return y if bias is None else emit.op("Add", y, emit.real(bias))
    shift = None if bias is None else emit.real(bias)
    return emit.op("LayerNormalization", x, weight, shift, axis=-1, epsilon=eps)


@translates(_OURO.cross_merge_norm_quantize.default)
def _cross_merge_norm_quantize(emit: Emitter, node: fx.Node) -> Translated:
    like = value_of(argument(node, "rows"))
    channels, length = int(like.shape[1]), int(like.shape[2])

    def total(name: str) -> str:
        made, back = emit.get(argument(node, name)), argument(node, f"{name}_back")
        return made if back is None else emit.op("Add", made, emit.get(back))

    sides = (argument(node, "width"), argument(node, "height"))
    columns = emit.op("Reshape", total("columns"), emit.integers(0, channels, *sides))
    columns = emit.op("Transpose", columns, perm=[0, 3, 2, 1])
    columns = emit.op("Reshape", columns, emit.integers(0, length, channels))
    rows = emit.op("Transpose", total("rows"), perm=[0, 2, 1])
    merged = _as_float(emit, emit.op("Add", rows, columns), like)
    y = _in_dtype(emit, _norm(emit, node, merged), like)
    return (*quantize(emit, node, _as_float(emit, y, like), like.transpose(1, 2).shape), y)


@translates(_OURO.causal_conv1d.default)
def _causal_conv1d(emit: Emitter, node: fx.Node) -> str:
    return _in_dtype(emit, _convolved(emit, node), value_of(node))


@translates(_OURO.causal_conv1d_quantize.default)
def _causal_conv1d_quantize(emit: Emitter, node: fx.Node) -> Translated:
    y = _convolved(emit, node)
    x = value_of(argument(node, "x"))
    y = _in_dtype(emit, y, x)
    tokens = emit.op("Transpose", _as_float(emit, y, x), perm=[0, 2, 1])
    return (*quantize(emit, node, tokens, x.transpose(1, 2).shape), y)


def _convolved(emit: Emitter, node: fx.Node) -> str:
    """The convolution of x (B, D, L), with SiLU if it has one, in fp32."""
    weight, reverse = argument(node, "weight"), argument(node, "reverse")
    channels, width = value_of(weight).shape
    known = emit.known(weight)
    if known is not None:
        taps = (known.flip(-1) if reverse else known)[:, None]
        name = f"{weight.target}.taps" + (".mirrored" if reverse else "")
        taps_name = emit.constant(taps, name)
        taps_name = (
            taps_name if taps.dtype == torch.float32 else emit.cast(taps_name, torch.float32)
        )
    else:
        made = emit.real(weight)
        made = flipped(emit, made, 1) if reverse else made
        taps_name = emit.op("Unsqueeze", made, emit.integers(1))
    bias = argument(node, "bias")
    y = emit.op(
        "Conv",
        emit.real(argument(node, "x")),
        taps_name,
        None if bias is None else emit.real(bias),
        pads=[0, width - 1] if reverse else [width - 1, 0],
        group=int(channels),
    )
    return emit.op("Mul", y, emit.op("Sigmoid", y)) if argument(node, "silu") else y


@translates(_OURO.depthwise_conv.default)
def _depthwise_conv(emit: Emitter, node: fx.Node) -> str:
    weight, bias = argument(node, "weight"), argument(node, "bias")
    channels, _, *sizes = value_of(weight).shape
    y = emit.op(
        "Conv",
        emit.real(argument(node, "x")),
        emit.real(weight),
        None if bias is None else emit.real(bias),
        pads=[(one - 1) // 2 for one in sizes] + [one // 2 for one in sizes],
        group=int(channels),
    )
    y = emit.op("Mul", y, emit.op("Sigmoid", y)) if argument(node, "silu") else y
    return _in_dtype(emit, y, value_of(node))


@translates(_OURO.gate_sum_quantize.default)
def _gate_sum_quantize(emit: Emitter, node: fx.Node) -> Translated:
    y, other, z = (argument(node, name) for name in ("y", "other", "z"))
    value, gate = emit.real(y), None
    if z is not None:
        open_ = emit.real(z)
        gate = emit.op("Mul", open_, emit.op("Sigmoid", open_))
        value = emit.op("Mul", value, gate)
    if other is not None:
        second = emit.real(other)
        second = second if gate is None else emit.op("Mul", second, gate)
        value = emit.op("Add", value, second)
    if argument(node, "factor") != 1:
        value = emit.op("Mul", value, emit.number(argument(node, "factor")))
    value = emit.op("Transpose", _in_dtype(emit, value, value_of(y)), perm=[0, 2, 1])
    given = _as_float(emit, value, value_of(y))
    return (*quantize(emit, node, given, value_of(y).transpose(1, 2).shape), value)


@translates(_OURO.cross_scan.default)
def _cross_scan(emit: Emitter, node: fx.Node) -> str:

    _, channels, height, width = value_of(node.args[0]).shape  # type: ignore[arg-type]
    x, flat = emit.get(node.args[0]), emit.integers(0, 1, int(channels), int(height) * int(width))
    rows = emit.op("Reshape", x, flat)
    columns = emit.op("Reshape", emit.op("Transpose", x, perm=[0, 1, 3, 2]), flat)
    ahead = emit.op("Concat", rows, columns, axis=1)
    return emit.op("Concat", ahead, flipped(emit, ahead, 3), axis=1)


@translates(_OURO.cross_merge.default)
def _cross_merge(emit: Emitter, node: fx.Node) -> str:

    height, width = argument(node, "height"), argument(node, "width")
    channels = int(value_of(node).shape[1])
    ahead, back = emit.multi("Split", [emit.get(node.args[0]), emit.integers(2, 2)], 2, axis=1)
    both = emit.op("Add", ahead, flipped(emit, back, 3))
    rows, columns = emit.multi("Split", [both, emit.integers(1, 1)], 2, axis=1)
    columns = emit.op("Reshape", columns, emit.integers(0, channels, width, height))
    columns = emit.op("Transpose", columns, perm=[0, 1, 3, 2])
    flat = emit.integers(0, channels, height * width)
    return emit.op("Add", emit.op("Reshape", rows, flat), emit.op("Reshape", columns, flat))


def _in_dtype(emit: Emitter, name: str, like: Tensor) -> str:
    return name if like.dtype == torch.float32 else emit.cast(name, like.dtype)


def _as_float(emit: Emitter, name: str, like: Tensor) -> str:
    return name if like.dtype == torch.float32 else emit.cast(name, torch.float32)
