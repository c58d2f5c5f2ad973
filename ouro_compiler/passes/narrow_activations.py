"""narrow_activations: products give 16-bit values where all that read them take such values.

Kernels wait for memory, and what lies between them is most of it: in fp16 or bf16 it is half as
many bytes. Every op computes in fp32 whatever it reads, so one rounding is added a value. Codes,
scales, constants, the residual stream and the graph's outputs stay as they are.

All products start as candidates. 16-bit values are followed through the graph; where one reaches an
operand that has to be fp32 (_READERS says which need not), the products that it comes from stop
being candidates, until nothing is left to refuse.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ouro_compiler.graph import argument, aten, is_op, value_of
from ouro_compiler.passes.base import PassContext
from ouro_compiler.passes.views import VIEWS

_OURO = torch.ops.ouro
_LINEAR = _OURO.linear_dynamic_outlier.default
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}

Sources = frozenset[fx.Node]  # the products that a 16-bit value comes from
_NONE: Sources = frozenset()


@dataclass(frozen=True)
class _Reader:
    """An op that takes 16-bit values.

    groups: operands by name, "delta.5" for an entry of a list; those of one group must be of one
    dtype. results: which of its outputs have the dtype of the first group's; None: its only output.
    """

    groups: tuple[tuple[str, ...], ...]
    results: tuple[int, ...] | None = ()


_READERS: Mapping[Any, _Reader] = {
    _LINEAR: _Reader((("x",), ("residual",))),
    _OURO.quantize_dynamic_outlier.default: _Reader((("x",),)),
    _OURO.quantize_static_outlier.default: _Reader((("x",),)),
    _OURO.dequantize_dynamic_outlier.default: _Reader((("x",),)),
    _OURO.add_norm.default: _Reader((("x",),), (0,)),
    _OURO.add_norm_quantize.default: _Reader((("x",),), (3,)),
    _OURO.cross_merge_norm_quantize.default: _Reader(
        (("rows", "rows_back", "columns", "columns_back"),), (3,)
    ),
    _OURO.causal_conv1d.default: _Reader((("x",),), None),
    _OURO.depthwise_conv.default: _Reader((("x",),), None),
    _OURO.causal_conv1d_quantize.default: _Reader((("x",),), (3,)),
    _OURO.gate_sum_quantize.default: _Reader((("y", "other", "z"),), (3,)),
    _OURO.selective_scan.default: _Reader((("u", "z"), ("delta",), ("B", "C")), None),
    _OURO.selective_scan_dynamic_outlier.default: _Reader(
        (("u", "z"), ("delta.5", "B.5", "C.5")), None
    ),
    aten.scaled_dot_product_attention.default: _Reader((("query", "key", "value"),), None),
    **{view: _Reader((("self",),), None) for view in VIEWS},
    **{
        part: _Reader((("self",),), None)
        for part in (aten.slice.Tensor, aten.select.int, aten.silu.default, aten.gelu.default)
    },
}
_NORMS = (_OURO.add_norm.default, _OURO.add_norm_quantize.default)
# Each of their results has the dtype of the tensor, or of all tensors promoted.
_SPLITS = frozenset({aten.split_with_sizes.default, aten.split.Tensor, aten.chunk.default})
_PROMOTING = frozenset({aten.add.Tensor, aten.mul.Tensor, aten.cat.default})


def narrow_activations(gm: fx.GraphModule, ctx: PassContext) -> bool:
    """Give products `config.activation_dtype` as far as the module docstring says."""
    dtype = _DTYPES.get(ctx.config.activation_dtype)
    if dtype is None:
        return False
    products = [node for node in gm.graph.nodes if is_op(node, _LINEAR)]
    candidates = frozenset(one for one in products if argument(one, "residual") is None)
    while refused := _refused(gm.graph, candidates):
        candidates -= refused
    changed = [one for one in candidates if argument(one, "dtype") != dtype]
    for one in changed:
        one.kwargs = {**one.kwargs, "dtype": dtype}
    if products:
        ctx.notes.append(
            f"{len(candidates)} of {len(products)} products give {ctx.config.activation_dtype}"
        )
    return bool(changed)


def _refused(graph: fx.Graph, candidates: Sources) -> Sources:
    """The candidates whose 16-bit values reach operands that have to be fp32."""
    found: dict[fx.Node, Sources] = {}  # of a value, or of all values of a tuple
    items: dict[fx.Node, tuple[int, ...]] = {}  # which of a tuple's values, where not all
    refused: Sources = _NONE
    for node in graph.nodes:
        given = {one: found[one] for one in node.all_input_nodes if found.get(one)}
        if node in candidates:
            found[node] = frozenset({node})
        if not given:
            continue
        reader = _READERS.get(node.target)
        if node.target is operator.getitem:
            source, index = node.args
            if source not in items or index in items[source]:
                found[node] = given[source]
        elif isinstance(node.meta.get("val"), int | torch.SymInt):
            pass  # a size
        elif node.target in _SPLITS:
            found[node] = frozenset().union(*given.values())
        elif node.target in _PROMOTING:
            wide = [one for one in _tensors(node) if one not in given]
            found[node] = _NONE if wide else frozenset().union(*given.values())
        elif reader is None:
            refused = refused.union(*given.values())
        else:
            refused |= _misplaced(node, reader, given)
            first = _operands(node, reader.groups[0])
            carried = frozenset().union(*(given[one] for one in first if one in given))
            if carried and reader.results is None:
                found[node] = carried
            elif carried and reader.results:
                found[node], items[node] = carried, reader.results + _sums(node)
    return refused


def _misplaced(node: fx.Node, reader: _Reader, given: Mapping[fx.Node, Sources]) -> Sources:
    """Sources of 16-bit operands that the reader does not take, or takes only if others are too."""
    allowed: set[fx.Node] = set()
    for group in reader.groups:
        members = _operands(node, group)
        if all(one in given for one in members):
            allowed.update(members)
    return frozenset().union(*(from_ for one, from_ in given.items() if one not in allowed))


def _operands(node: fx.Node, names: tuple[str, ...]) -> list[fx.Node]:
    """The operands of these names that are there."""
    found = []
    for name in names:
        name, _, index = name.partition(".")
        value = argument(node, name)
        found.append(value[int(index)] if index else value)
    return [one for one in found if isinstance(one, fx.Node)]


def _sums(node: fx.Node) -> tuple[int, ...]:
    """Where a norm's sum, its last result, has x's dtype too: without a residual or fp32."""
    if not is_op(node, *_NORMS) or argument(node, "residual") or argument(node, "residual_fp32"):
        return ()
    return (len(value_of(node)) - 1,)


def _tensors(node: fx.Node) -> Iterator[fx.Node]:
    """Tensor operands with dimensions: others do not take part in type promotion."""
    for one in node.all_input_nodes:
        value = value_of(one)
        if isinstance(value, Tensor) and value.dim():
            yield one
