"""Where in the image each token of a captured graph lies, told by the graph alone.

Every value gets coordinates of its own shape: one number an element, the row (then, in a second
run, the column) of the pixels that the element stands for, NaN where it stands for none: constants,
class tokens, padding. Views and copies are run on the coordinates as they are; other operators are
judged by the shapes they turn into each other. So the order of any scan is known, whatever model it
belongs to: rows, columns, reversed, windowed, with a class token anywhere.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ouro_compiler.graph import aten, is_op, value_of
from ouro_compiler.ops.cross_scan import ORDERS

_NONE = float("nan")
_PADS = (aten.constant_pad_nd.default, aten.pad.default)
# Operators that only move elements: run on coordinates as they are.
_NAMES = """
    alias cat chunk clone contiguous detach expand flatten flip gather index index_select
    lift_fresh_copy movedim narrow numpy_T permute pixel_unshuffle repeat reshape roll rot90 select
    slice split split_with_sizes squeeze stack swapaxes t mT transpose unbind unflatten unfold
    unsqueeze view _unsafe_view
"""
_MOVES = frozenset(
    getattr(packet, overload)
    for packet in (getattr(aten, name) for name in _NAMES.split())
    for overload in packet.overloads()
) | {torch.ops.ouro.cross_scan.default}


@dataclass(frozen=True)
class Grid:
    """The map of patches behind a sequence of tokens, in `windows` independent windows.

    steps: (windows, height * width) int64, the token at each cell in raster order, -1 where a
    window has none. Tokens that are in no cell (class tokens, padding) take no part.
    """

    height: int
    width: int
    steps: Tensor

    @property
    def windows(self) -> int:
        """Windows an image is cut into: the batch of the tokens is images times windows."""
        return self.steps.shape[0]

    def gather(self, tokens: Tensor) -> Tensor:
        """(B * windows, L, ...) -> (B * windows, height * width, ...), 0 in empty cells."""
        images = tokens.shape[0] // self.windows
        steps = self.steps.to(tokens.device).repeat(images, 1)
        steps = steps.view(*steps.shape, *[1] * (tokens.dim() - 2))
        index = steps.clamp(min=0).expand(-1, -1, *tokens.shape[2:])
        found = tokens.gather(1, index)
        return found if self.is_full else found * (steps >= 0)

    def around(self, patch: int) -> Tensor:
        """(windows, height * width, patch^2) int64: the tokens of the cells around each cell.

        -1 where there is none, and everywhere for a cell without a token.
        """
        reach = patch // 2
        maps = self.steps.unflatten(1, (self.height, self.width))
        padded = F.pad(maps, (reach, reach, reach, reach), value=-1)
        views = padded.unfold(1, patch, 1).unfold(2, patch, 1)
        return views.flatten(3).flatten(1, 2).masked_fill(self.steps[..., None] < 0, -1)

    def present(self, images: int) -> Tensor:
        """(images * windows, height * width) bool: cells that hold a token."""
        return (self.steps >= 0).repeat(images, 1)

    @property
    def is_full(self) -> bool:
        """Has every cell a token?"""
        return bool((self.steps >= 0).all())


def find_grids(gm: fx.GraphModule, tokens: dict[fx.Node, int]) -> dict[fx.Node, Grid]:
    """The grid of each node's tokens; nodes whose tokens have no place in the image are left out.

    tokens: nodes, and the axis of their value that counts tokens; axis 0 is the batch, times the
    windows of an image. gm: a graph of one image input (B, C, H, W).
    """
    rows, columns = (_Coordinates(gm, axis, tokens).find() for axis in (2, 3))
    found = {node: _grid(rows[node], columns[node]) for node in tokens}
    return {node: grid for node, grid in found.items() if grid is not None}


def _grid(rows: Tensor, columns: Tensor) -> Grid | None:
    """Coordinates (windows, L) -> the smallest grid that holds every window's tokens once."""
    cells: list[tuple[Tensor, Tensor, Tensor]] = []
    for y, x in zip(rows, columns, strict=True):
        steps = torch.nonzero(~(y.isnan() | x.isnan())).flatten()
        y_rank, x_rank = (torch.unique(c[steps], return_inverse=True)[1] for c in (y, x))
        cells.append((steps, y_rank, x_rank))
    if sum(len(steps) for steps, _, _ in cells) == 0:
        return None
    height = 1 + max(int(y.max()) for _, y, _ in cells if len(y))
    width = 1 + max(int(x.max()) for _, _, x in cells if len(x))
    table = torch.full((len(cells), height * width), -1)
    for window, (steps, y, x) in enumerate(cells):
        cell = y * width + x
        if len(torch.unique(cell)) != len(cell):
            return None  # tokens that stand for the same pixels: no map
        table[window, cell] = steps
    return Grid(height, width, table)


class _Coordinates(fx.Interpreter):
    """Runs a graph on coordinates along one axis (2: rows, 3: columns) of one image."""

    def __init__(self, gm: fx.GraphModule, axis: int, tokens: dict[fx.Node, int]) -> None:
        super().__init__(gm)
        self.axis, self.tokens = axis, tokens
        self.found: dict[fx.Node, Tensor] = {}

    def find(self) -> dict[fx.Node, Tensor]:
        """Coordinates (windows, L) of the nodes asked for."""
        (image,) = (node for node in self.graph.nodes if node.op == "placeholder")
        _, channels, height, width = value_of(image).shape
        side = torch.arange((height, width)[self.axis - 2], dtype=torch.float32)
        view = side[:, None] if self.axis == 2 else side[None, :]
        with torch.no_grad():
            self.run(view.expand(1, channels, height, width).contiguous())
        return self.found

    def run_node(self, n: fx.Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n.op == "get_attr":
            value = _without_places(super().run_node(n))
        elif n.op != "call_function":
            return super().run_node(n)
        elif n.target is operator.getitem or not isinstance(n.target, torch._ops.OpOverload):
            value = n.target(*args, **kwargs)  # type: ignore[operator]
        elif n.target is aten.sym_size.int:
            value = args[0].shape[args[1]]
        elif is_op(n, *_PADS):
            value = F.pad(args[0], args[1], value=_NONE)
        elif n.target in _MOVES:
            value = n.target(*args, **kwargs)
        elif is_op(n, torch.ops.ouro.cross_merge.default):
            value = n.target(*args, **kwargs) / ORDERS  # it adds up four of the same
        else:
            tensors = [one for one in _tensors(args) if one.is_floating_point()]
            value = _like(value_of(n), lambda shape: _placed(n, tensors, shape))
        if n in self.tokens:
            self.found[n] = _of_tokens(value, self.tokens[n])
        return value


def _of_tokens(value: Tensor, axis: int) -> Tensor:
    """(windows, ..., L, ...) -> (windows, L)."""
    return value.movedim(axis, 1).flatten(2).nanmean(2)


def _without_places(constant: Any) -> Any:
    is_real = isinstance(constant, Tensor) and constant.is_floating_point()
    return torch.full(constant.shape, _NONE) if is_real else constant


def _tensors(args: Sequence[Any]) -> list[Tensor]:
    flat: list[Tensor] = []
    for one in args:
        if isinstance(one, Tensor):
            flat.append(one)
        elif isinstance(one, (list, tuple)):
            flat += _tensors(one)
    return flat


def _like(value: Any, place: Any) -> Any:
    """The coordinates of a value, or of a tuple of them; what is no float has none."""
    if isinstance(value, (list, tuple)):
        return type(value)(_like(one, place) for one in value)
    if not isinstance(value, Tensor):
        return _at_batch_one(value)
    shape = [_at_batch_one(size) for size in value.shape]
    if not value.dtype.is_floating_point:
        return torch.zeros(shape, dtype=value.dtype)
    return place(shape)


def _at_batch_one(size: Any) -> Any:
    """A symbolic size for a batch of one image."""
    if not isinstance(size, torch.SymInt):
        return size
    expression = size.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, 1)))


def _placed(node: fx.Node, inputs: list[Tensor], shape: list[int]) -> Tensor:
    """Coordinates of an operator's result, by the shapes that it turns into each other."""
    if torch.Tag.pointwise in node.target.tags:  # type: ignore[union-attr]
        result = torch.full(shape, _NONE)
        for one in inputs:
            result = torch.where(result.isnan(), one.expand(shape), result)
        return result
    first = inputs[0] if inputs else torch.full(shape, _NONE)
    if list(first.shape) == shape:
        return first  # norms, softmax, scans, convolutions of one resolution
    if first.dim() == len(shape) and list(first.shape[:-1]) == shape[:-1]:  # linears, attention
        return first.nanmean(-1, keepdim=True).expand(shape).contiguous()
    if first.dim() == len(shape) == 4 and first.shape[0] == shape[0]:
        # Convolutions and poolings: another map of the same image.
        places = F.adaptive_avg_pool2d(first.nanmean(1, keepdim=True), (shape[2], shape[3]))
        return places.expand(shape).contiguous()
    if first.dim() == len(shape) == 3 and first.shape[2] == shape[2]:  # 1x1 convolutions
        return first.nanmean(1, keepdim=True).expand(shape).contiguous()
    return torch.full(shape, _NONE)
