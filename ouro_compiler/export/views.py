"""Translations of ATen ops that move, cut or join values without computing."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import fx

from ouro_compiler.errors import ModelError
from ouro_compiler.export.emitter import Emitter, static, translates
from ouro_compiler.graph import argument, aten, value_of


@translates(
    aten.contiguous.default,
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
    aten.dropout.default,  # capture is in eval mode
)
def _same(emit: Emitter, node: fx.Node) -> str:
    return emit.get(node.args[0])


@translates(
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten._to_copy.default,
    aten.type_as.default,
)
def _to(emit: Emitter, node: fx.Node) -> str:
    x = node.args[0]
    dtype = value_of(node).dtype
    name = emit.get(x)
    return name if value_of(x).dtype == dtype else emit.cast(name, dtype)  # type: ignore[arg-type]


@translates(
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.squeeze.default,
)
def _reshape(emit: Emitter, node: fx.Node) -> str:
    sizes: Any = node.args[1] if node.target in _SIZED else ()
    before = value_of(node.args[0]).shape  # type: ignore[arg-type]
    return emit.reshape(emit.get(node.args[0]), before, value_of(node).shape, sizes)


_SIZED = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


@translates(aten.transpose.int, aten.t.default, aten.permute.default, aten.movedim.int)
def _permute(emit: Emitter, node: fx.Node) -> str:
    rank = value_of(node).dim()
    order = list(range(rank))
    if node.target is aten.permute.default:
        order = [axis % rank for axis in argument(node, "dims")]
    elif node.target is aten.movedim.int:
        source, goal = argument(node, "source") % rank, argument(node, "destination") % rank
        order.insert(goal, order.pop(source))
    else:
        first, second = 0, 1
        if node.target is aten.transpose.int:
            first, second = argument(node, "dim0") % rank, argument(node, "dim1") % rank
        if rank > 1:
            order[first], order[second] = order[second], order[first]
    return emit.op("Transpose", emit.get(node.args[0]), perm=order)


@translates(aten.expand.default, aten.expand_as.default)
def _expand(emit: Emitter, node: fx.Node) -> str:
    x = emit.get(node.args[0])
    if node.target is aten.expand_as.default:
        return emit.op("Expand", x, emit.op("Shape", emit.get(node.args[1])))
    sizes = [1 if one == -1 else one for one in argument(node, "size")]  # 1 keeps a size in ONNX
    return emit.op("Expand", x, emit.size_vector(sizes))


@translates(aten.repeat.default)
def _repeat(emit: Emitter, node: fx.Node) -> str:
    repeats = argument(node, "repeats")
    x = emit.get(node.args[0])
    missing = len(repeats) - value_of(node.args[0]).dim()  # type: ignore[arg-type]
    if missing:
        x = emit.op("Unsqueeze", x, emit.integers(*range(missing)))
    return emit.op("Tile", x, emit.size_vector(repeats))


@translates(aten.slice.Tensor, aten.narrow.default)
def _slice(emit: Emitter, node: fx.Node) -> str:
    start = argument(node, "start") or 0
    if node.target is aten.narrow.default:
        end, step = start + argument(node, "length"), 1
    else:
        end, step = argument(node, "end"), argument(node, "step")
    end = sys.maxsize if end is None else end
    return _cut(emit, emit.get(node.args[0]), start, end, argument(node, "dim"), step)


def _cut(emit: Emitter, x: str, start: Any, end: Any, axis: int, step: int = 1) -> str:
    first, last = emit.size_vector([start]), emit.size_vector([end])
    return emit.op("Slice", x, first, last, emit.integers(axis), emit.integers(step))


@translates(aten.select.int)
def _select(emit: Emitter, node: fx.Node) -> str:
    index = emit.number(argument(node, "index"), torch.int64)
    return emit.op("Gather", emit.get(node.args[0]), index, axis=argument(node, "dim"))


@translates(aten.index_select.default)
def _index_select(emit: Emitter, node: fx.Node) -> str:
    index = emit.get(argument(node, "index"))
    return emit.op("Gather", emit.get(node.args[0]), index, axis=argument(node, "dim"))


@translates(aten.split_with_sizes.default, aten.split.Tensor, aten.chunk.default)
def _split(emit: Emitter, node: fx.Node) -> tuple[str, ...]:
    axis = argument(node, "dim")
    parts = [static(part.shape[axis]) for part in value_of(node)]
    if None in parts:
        raise ModelError(f"{node.name}: ONNX export cannot split the batch")
    sizes = emit.integers(*(part for part in parts if part is not None))
    return tuple(emit.multi("Split", [emit.get(node.args[0]), sizes], len(parts), axis=axis))


@translates(aten.unbind.int)
def _unbind(emit: Emitter, node: fx.Node) -> tuple[str, ...]:
    x, axis = emit.get(node.args[0]), argument(node, "dim")
    return tuple(
        emit.op("Gather", x, emit.number(index, torch.int64), axis=axis)
        for index in range(len(value_of(node)))
    )


@translates(aten.cat.default)
def _cat(emit: Emitter, node: fx.Node) -> str:
    names = [emit.get(one) for one in argument(node, "tensors")]
    return emit.op("Concat", *names, axis=argument(node, "dim"))


@translates(aten.stack.default)
def _stack(emit: Emitter, node: fx.Node) -> str:
    axis = argument(node, "dim")
    axis = axis if axis >= 0 else axis + value_of(node).dim()
    names = [
        emit.op("Unsqueeze", emit.get(one), emit.integers(axis))
        for one in argument(node, "tensors")
    ]
    return emit.op("Concat", *names, axis=axis)


@translates(aten.flip.default)
def _flip(emit: Emitter, node: fx.Node) -> str:
    x = emit.get(node.args[0])
    for axis in argument(node, "dims"):
        x = flipped(emit, x, axis)
    return x


def flipped(emit: Emitter, x: str, axis: int) -> str:
    """x from its last entry to its first."""
    return _cut(emit, x, -1, -sys.maxsize, axis, -1)


@translates(aten.roll.default)
def _roll(emit: Emitter, node: fx.Node) -> str:
    x, dims = emit.get(node.args[0]), argument(node, "dims")
    if not dims:
        raise ModelError(f"{node.name}: ONNX export rolls along named dimensions only")
    for shift, axis in zip(argument(node, "shifts"), dims, strict=True):
        last = _cut(emit, x, -shift, sys.maxsize, axis)
        x = emit.op("Concat", last, _cut(emit, x, 0, -shift, axis), axis=axis)
    return x


@translates(aten.pad.default, aten.constant_pad_nd.default)
def _pad(emit: Emitter, node: fx.Node) -> str:
    mode = argument(node, "mode") if node.target is aten.pad.default else "constant"
    names = {"constant": "constant", "reflect": "reflect", "replicate": "edge"}
    if mode not in names:
        raise ModelError(f"{node.name}: ONNX export has no padding called {mode}")
    pads, value = list(argument(node, "pad")), argument(node, "value")
    axes = [-1 - index for index in range(len(pads) // 2)]
    return emit.op(
        "Pad",
        emit.get(node.args[0]),
        emit.size_vector([*pads[::2], *pads[1::2]]),
        emit.number(value or 0.0) if mode == "constant" else None,
        emit.integers(*axes),
        mode=names[mode],
    )
