"""A graph that was traced for one batch size -> the same graph for every batch size.

Dynamo writes the sizes of a static input into the graph: `expand(2, -1, -1)`. Calibration, and the
promise of the same codes as `ouro-compile`, need other batches.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ouro_compiler.errors import ModelError
from ouro_compiler.frontend.capture import capture, export
from ouro_compiler.frontend.dynamo import UncalibratableError, refuse_training
from ouro_compiler.graph import aten, insert_call, value_of

_VIEWS = frozenset({aten.view.default, aten.reshape.default, aten._unsafe_view.default})
_EXPANSIONS = frozenset({aten.expand.default, aten.broadcast_to.default})
_FACTORIES = frozenset(
    getattr(aten, name).default
    for name in ("zeros", "ones", "full", "new_zeros", "new_ones", "new_empty", "new_full")
) | {aten.empty.memory_format}
_TOLERANCE = 1e-3  # of the largest output: kernels differ between batch sizes in the last bits


def free_batch(module: fx.GraphModule, images: Tensor) -> fx.GraphModule:
    """Capture, for every batch size, what `module` computes for batches of one.

    module: images (B, ...) -> a tensor, or a tuple of several, each with B first. images: of that
    B, what the result is tried on. Sizes that hold B are read off the images instead, and the
    result is compared on a batch of 2 B with two batches of B: a graph that cannot be freed in this
    way is refused, with UncalibratableError. Raises ModelError for what torch.export cannot trace,
    and UsageError for a model in training mode.
    """
    batch = images.shape[0]
    static = export(module, images, static=True).module(check_guards=False)
    assert isinstance(static, fx.GraphModule)
    refuse_training(static)  # before outputs are compared, which random numbers make differ
    pair = images, images.flip(-1)
    # A module anew, since that of an exported program cannot be set to eval mode.
    freed = fx.GraphModule(static, static.graph)
    with torch.no_grad():
        expected = [_outputs(static(half)) for half in pair]
        try:
            found = _outputs(_Freeing(freed, batch).run(torch.cat(pair)))
        except RuntimeError as error:  # an op that has no meaning for the other batch
            raise UncalibratableError(_reason(batch)) from error
    for one, first, second in zip(found, *expected, strict=True):
        if first.dim() == 0 or not _close(one, torch.cat((first, second))):
            raise UncalibratableError(_reason(batch))
    freed.recompile()
    try:
        return capture(freed, images)
    except ModelError as error:
        raise UncalibratableError(_reason(batch)) from error


def _reason(batch: int) -> str:
    return (
        f"it holds for batches of {batch} alone; torch.compile(..., dynamic=True) and a first "
        "batch of 2 or more leave the batch size open"
    )


def _outputs(value: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else tuple(value)


def _close(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    limit = _TOLERANCE * float(other.nan_to_num(0, 0, 0).abs().max())
    return torch.allclose(one, other, rtol=0, atol=limit, equal_nan=True)


class _Freeing(fx.Interpreter):
    """Runs a batch of another size, and rewrites each size that holds the old one on the way.

    Where the batch is in an op's input is told by its shape, which differs from the traced one.
    """

    def __init__(self, gm: fx.GraphModule, batch: int) -> None:
        image = next(node for node in gm.graph.nodes if node.op == "placeholder")
        with gm.graph.inserting_after(image):
            self._size = gm.graph.call_function(aten.sym_size.int, (image, 0))
        self._batch = batch
        super().__init__(gm)

    def run_node(self, n: fx.Node) -> Any:
        if n.target in _VIEWS:
            self._free_view(n)
        elif n.target is aten.unflatten.int:
            self._free_unflatten(n)
        elif n.target in _EXPANSIONS:
            self._free_expansion(n)
        elif n.target is aten.repeat.default and not self._scaled(n.args[0]):
            self._free_leading(n, 1)
        elif n.target in _FACTORIES:
            self._free_leading(n, 1 if isinstance(n.args[0], fx.Node) else 0)
        return super().run_node(n)

    def _scaled(self, node: Any) -> list[int]:
        """Dimensions of a node's value that hold the batch."""
        before, now = value_of(node).shape, self.env[node].shape
        return [index for index, size in enumerate(before) if size != now[index]]

    def _times(self, node: fx.Node, factor: int) -> fx.Node:
        """The batch size times a number, as a node before `node`."""
        if factor == 1:
            return self._size
        product = insert_call(node.graph, node, operator.mul, self._size, factor)
        self.env[product] = self.env[self._size] * factor
        return product

    def _free_view(self, node: fx.Node) -> None:
        scaled = self._scaled(node.args[0])
        if len(scaled) != 1:
            return
        before, after = value_of(node.args[0]).shape, value_of(node).shape  # type: ignore[arg-type]
        left = math.prod(before[: scaled[0]])  # row-major: the batch stays behind as many elements
        places = [
            index
            for index, size in enumerate(after)
            if math.prod(after[:index]) == left and size % self._batch == 0
        ]
        exact = [index for index in places if after[index] == self._batch]
        for place in (exact or places)[:1]:
            sizes: list[Any] = list(node.args[1])  # type: ignore[arg-type]
            if sizes[place] != -1:
                sizes[place] = self._times(node, after[place] // self._batch)
                node.update_arg(1, sizes)

    def _free_unflatten(self, node: fx.Node) -> None:
        dim: Any = node.args[1]
        sizes: list[Any] = list(node.args[2])  # type: ignore[arg-type]
        at = dim % value_of(node.args[0]).dim()  # type: ignore[arg-type]
        if self._scaled(node.args[0]) == [at] and sizes[0] > 0 and sizes[0] % self._batch == 0:
            sizes[0] = self._times(node, sizes[0] // self._batch)
            node.update_arg(2, sizes)

    def _free_expansion(self, node: fx.Node) -> None:
        sizes: list[Any] = list(node.args[1])  # type: ignore[arg-type]
        added = len(sizes) - value_of(node.args[0]).dim()  # type: ignore[arg-type]
        scaled = self._scaled(node.args[0])
        for index in scaled:
            sizes[index + added] = -1
        node.update_arg(1, sizes)
        if not scaled:
            self._free_leading(node, 1)

    def _free_leading(self, node: fx.Node, where: int) -> None:
        """A leading size that equals the batch is taken for it; the outputs tell if it was not."""
        sizes: list[Any] = list(node.args[where])  # type: ignore[arg-type]
        if len(sizes) > 1 and sizes[0] == self._batch:
            node.update_arg(where, [self._size, *sizes[1:]])
