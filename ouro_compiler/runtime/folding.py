"""A graph made ready to run: constants are computed once, kernels are called directly.

The stored graph stays as it is: it runs on every device, and shows what is computed.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ouro_compiler.kernels.dispatch import function_on


def fold_constants(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph in which what depends on constants alone is a constant.

    Weights of scans, and fp16 parameters that ATen reads as fp32, are held in fp32. Codes of linear
    layers stay packed.
    """
    folded = _copy(gm)
    _compute_constants(folded)
    folded.graph.eliminate_dead_code()
    folded.delete_all_unused_submodules()
    folded.recompile()
    return folded


def call_directly(gm: fx.GraphModule, device: str) -> fx.GraphModule:
    """A copy of a graph that calls kernels without the dispatcher, which costs as much as some.

    device: whose kernels they are, "cpu" or "cuda".
    """
    direct = _copy(gm)
    for node in direct.graph.nodes:
        if node.target == torch.ops.aten.unflatten.int:
            node.target = unflatten
        elif isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "ouro":
            name = node.target._schema.name.removeprefix("ouro::")
            node.target = function_on(device.upper(), name) or node.target
    direct.recompile()
    return direct


def unflatten(x: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
    """aten.unflatten with the strides that it has on fake tensors, of which tapes are made.

    The real one gives a batch of one another stride, and convolutions then choose another memory
    format: other last bits in the first run of a size than in the next.
    """
    found = x.unflatten(dim, list(sizes))
    place = dim % x.dim()
    count = found.dim() - x.dim() + 1
    inner = [x.stride(place)]
    for size in reversed(found.shape[place + 1 : place + count]):
        inner.insert(0, inner[0] * size)
    strides = (*x.stride()[:place], *inner, *x.stride()[place + 1 :])
    return found.as_strided(found.shape, strides)


def _copy(gm: fx.GraphModule) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    graph.set_codegen(gm.graph._codegen)
    return fx.GraphModule(gm, graph)


def _compute_constants(gm: fx.GraphModule) -> None:
    values: dict[fx.Node, Any] = {}
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            values[node] = operator.attrgetter(str(node.target))(gm)
        elif _is_constant(node, values):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)
    for number, node in enumerate(list(gm.graph.nodes)):
        read = node.op == "call_function" and any(user not in values for user in node.users)
        if not (node in values and read and isinstance(values[node], Tensor)):
            continue
        name = f"_bound_{number}"
        gm.register_buffer(name, values[node].contiguous(), persistent=False)
        with gm.graph.inserting_before(node):
            node.replace_all_uses_with(gm.graph.get_attr(name))


def _is_constant(node: fx.Node, values: dict[fx.Node, Any]) -> bool:
    inputs = node.all_input_nodes
    return node.op == "call_function" and bool(inputs) and all(one in values for one in inputs)
