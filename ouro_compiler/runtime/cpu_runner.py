"""Running a graph on a CPU: constants are computed once, kernels are called as directly as can be.

The stored graph stays as it is: it runs on every device, and shows what is computed.
"""

from __future__ import annotations

import operator
import threading
from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ouro_compiler.kernels.dispatch import function_on
from ouro_compiler.runtime.tape import Tape

_TAPES = 2  # batch sizes whose memory is kept


class CpuRunner:
    """Runs a graph of one input, bit for bit as the graph itself would.

    The first batch of a size goes through the graph; a size that comes again gets a tape.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        with torch.inference_mode():
            self._folded = fold_constants(gm)
            self._direct = call_directly(self._folded)
        self._seen: Counter[int] = Counter()
        self._tapes: OrderedDict[int, Tape] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, images: Tensor) -> Any:
        """The graph's outputs for images (B, ...)."""
        size = images.shape[0]
        self._seen[size] += 1
        with torch.inference_mode():
            if self._seen[size] == 1 or size == 0:
                outputs = self._direct(images)
            else:
                outputs = self._tape(images)(images)
        # What leaves may be used under autograd, which inference tensors may not.
        return pytree.tree_map_only(Tensor, Tensor.clone, outputs)

    def traced(self, images: Tensor, labels: Mapping[str, str]) -> Any:
        """A run on a tape under `torch.profiler`: steps go by their node's label, or its name."""
        if not self._seen[images.shape[0]]:
            self(images)  # tapes are made of kernels that were built and checked
        with torch.inference_mode():
            outputs = self._tape(images).traced(images, labels)
        return pytree.tree_map_only(Tensor, Tensor.clone, outputs)

    def _tape(self, images: Tensor) -> Tape:
        with self._lock:
            size = images.shape[0]
            found = self._tapes.pop(size, None) or Tape(self._folded, images)
            self._tapes[size] = found  # the last one used is the last one dropped
            while len(self._tapes) > _TAPES:
                self._tapes.popitem(last=False)
            return found


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


def call_directly(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph that calls kernels without the dispatcher, which costs as much as some."""
    direct = _copy(gm)
    for node in direct.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "ouro":
            name = node.target._schema.name.removeprefix("ouro::")
            node.target = function_on("CPU", name) or node.target
    direct.recompile()
    return direct


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
