"""A graph that was traced for one batch size -> the same graph for every batch size.

Dynamo writes the sizes of a static input into the graph: `expand(2, -1, -1)`. Calibration, and the
promise of the same codes as `ouro-compile`, need other batches.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx

from ouro_compiler.errors import ModelError
from ouro_compiler.frontend.capture import capture, export
from ouro_compiler.frontend.dynamo import UncalibratableError
from ouro_compiler.graph import argument, aten, value_of

_SIZES = ("size", "shape", "sizes", "repeats")
_VIEWS = frozenset({aten.view.default, aten.reshape.default, aten._unsafe_view.default})
_TOLERANCE = 1e-3


def free_batch(module: fx.GraphModule, images: Tensor) -> fx.GraphModule:
    """Capture, for every batch size, what `module` computes for batches of one.

    module: images (B, ...) -> a tensor, or a tuple of several, each with B first. images: of that
    B, what the result is tried on. The leading sizes that are B are read off the image instead, and
    the result is run on a batch of 2 B: a graph that cannot be freed in this way is refused, with
    UncalibratableError. Raises ModelError for what torch.export cannot trace at all.
    """
    batch = images.shape[0]
    static = export(module, images, static=True).module(check_guards=False)
    assert isinstance(static, fx.GraphModule)
    pairs = images, images.flip(-1)
    with torch.no_grad():
        expected = [_outputs(static(half)) for half in pairs]
    _free_sizes(static.graph, batch)
    static.recompile()
    try:
        gm = capture(static, images)
        with torch.no_grad():
            found = _outputs(gm(torch.cat(pairs)))
    except (ModelError, RuntimeError) as error:
        raise UncalibratableError(_reason(batch)) from error
    for one, first, second in zip(found, *expected, strict=True):
        if first.dim() == 0 or not _close(one, torch.cat((first, second))):
            raise UncalibratableError(_reason(batch))
    return gm


def _reason(batch: int) -> str:
    return (
        f"it holds for batches of {batch} alone; torch.compile(..., dynamic=True) and a first "
        "batch of 2 or more leave the batch size open"
    )


def _outputs(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else tuple(value)


def _close(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    limit = _TOLERANCE * float(other.abs().max()) if other.is_floating_point() else 0
    return bool(((one - other).abs() <= limit).all())


def _free_sizes(graph: fx.Graph, batch: int) -> None:
    """Replace leading sizes that are the batch by nodes that read it."""
    image = next(node for node in graph.nodes if node.op == "placeholder")
    with graph.inserting_after(image):
        size = graph.call_function(aten.sym_size.int, (image, 0))
    moving = {image}  # what is computed from the image
    for node in list(graph.nodes):
        if node is size or node.op != "call_function":
            continue
        if any(source in moving for source in node.all_input_nodes):
            moving.add(node)
        where = _sizes_argument(node)
        # A weight's view stays; its expansion, like a fresh tensor, may be to the batch.
        if where is not None and (node in moving or node.target not in _VIEWS):
            sizes = list(node.args[where])  # type: ignore[arg-type]
            sizes[0] = _freed(node, sizes, size, batch)
            node.update_arg(where, sizes)
    if not size.users:
        graph.erase_node(size)


def _sizes_argument(node: fx.Node) -> int | None:
    """The position of an op's list of sizes, if it has one that starts with a number."""
    schema = getattr(node.target, "_schema", None)
    for index, arg in enumerate(schema.arguments if schema is not None else ()):
        if arg.name in _SIZES and index < len(node.args):
            sizes = argument(node, arg.name)
            if isinstance(sizes, (list, tuple)) and sizes and isinstance(sizes[0], int):
                return index
    return None


def _freed(node: fx.Node, sizes: list[object], size: fx.Node, batch: int) -> object:
    """What the leading size of a node becomes."""
    leading = sizes[0]
    assert isinstance(leading, int)
    source = node.args[0] if node.target in _VIEWS else None
    before = value_of(source).shape[0] if isinstance(source, fx.Node) else None
    graph = node.graph
    with graph.inserting_before(node):
        if leading < 0:
            return leading
        if before == leading and isinstance(source, fx.Node):  # the batch times something, or not
            return graph.call_function(aten.sym_size.int, (source, 0))
        if leading == batch:
            return size
        if before == batch and leading % batch == 0:  # (B, L, K) flattened to (B L, K)
            return graph.call_function(operator.mul, (size, leading // batch))
    return leading
