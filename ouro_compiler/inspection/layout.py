"""Places for the nodes of an acyclic graph: rows from top to bottom, few crossings, short edges.

The method is Sugiyama's: longest paths give the rows, edges over several rows get a point in each,
neighbours' averages order the rows, and a least-squares fit with a smallest distance places them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import networkx as nx

NODE_WIDTH, NODE_HEIGHT = 168, 46
_GAP, _ROW_GAP, _POINT_WIDTH = 18, 30, 14
_SWEEPS = 6

Point = tuple[int, int]


@dataclass
class Layout:
    """Centres of nodes and bends of edges, in pixels from the upper left corner."""

    width: int
    height: int
    nodes: dict[Any, Point] = field(default_factory=dict)
    edges: dict[tuple[Any, Any], list[Point]] = field(default_factory=dict)  # bends only


def lay_out(network: nx.DiGraph) -> Layout:
    """Place every node of an acyclic graph. The same graph gives the same places."""
    rows = _rows(network)
    if not rows:
        return Layout(0, 0)
    above, below, bends = _with_points(network, rows)
    _order(rows, above, below)
    places = _columns(rows, above, below)
    left = min(places[one] - _width(one) / 2 for row in rows for one in row)
    right = max(places[one] + _width(one) / 2 for row in rows for one in row)
    step = NODE_HEIGHT + _ROW_GAP
    found = Layout(round(right - left), len(rows) * step - _ROW_GAP)
    at = {
        one: (round(places[one] - left), number * step + NODE_HEIGHT // 2)
        for number, row in enumerate(rows)
        for one in row
    }
    found.nodes = {one: at[one] for row in rows for one in row if not isinstance(one, _Bend)}
    found.edges = {edge: [at[one] for one in points] for edge, points in bends.items()}
    return found


@dataclass(frozen=True)
class _Bend:
    """The point at which an edge passes a row."""

    edge: tuple[Any, Any]
    row: int


def _width(one: Any) -> int:
    return _POINT_WIDTH if isinstance(one, _Bend) else NODE_WIDTH


def _rows(network: nx.DiGraph) -> list[list[Any]]:
    """Longest path from a source; then down to their readers, where that lengthens nothing."""
    import networkx as nx

    depth: dict[Any, int] = {}
    order = list(nx.lexicographical_topological_sort(network, key=_positions(network).get))
    for one in order:
        depth[one] = 1 + max((depth[source] for source in network.predecessors(one)), default=-1)
    for one in reversed(order):
        readers = [depth[user] for user in network.successors(one)]
        if readers and network.in_degree(one) <= len(readers):
            depth[one] = min(readers) - 1
    lowest = min(depth.values(), default=0)
    rows: list[list[Any]] = [[] for _ in range(1 + max(depth.values(), default=-1) - lowest)]
    for one in order:
        rows[depth[one] - lowest].append(one)
    return rows


def _positions(network: nx.DiGraph) -> dict[Any, int]:
    return {one: number for number, one in enumerate(network)}


_Neighbours = dict[Any, list[Any]]


def _with_points(
    network: nx.DiGraph, rows: list[list[Any]]
) -> tuple[_Neighbours, _Neighbours, dict[tuple[Any, Any], list[Any]]]:
    """Add a point to every row that an edge passes; neighbours above and below, points of edges."""
    depth = {one: number for number, row in enumerate(rows) for one in row}
    above: _Neighbours = {one: [] for one in depth}
    below: _Neighbours = {one: [] for one in depth}
    bends: dict[tuple[Any, Any], list[Any]] = {}
    for source, user in network.edges:
        points = [_Bend((source, user), row) for row in range(depth[source] + 1, depth[user])]
        bends[source, user] = points
        for one in points:
            rows[one.row].append(one)
            above[one], below[one] = [], []
        chain = [source, *points, user]
        for upper, lower in pairwise(chain):
            below[upper].append(lower)
            above[lower].append(upper)
    return above, below, bends


def _order(rows: list[list[Any]], above: _Neighbours, below: _Neighbours) -> None:
    """Sort rows by the mean position of their neighbours, downwards and upwards in turn."""
    place = {one: float(index) for row in rows for index, one in enumerate(row)}
    for sweep in range(_SWEEPS):
        neighbours = below if sweep % 2 else above
        for row in rows[::-1] if sweep % 2 else rows:
            means = {one: _mean([place[n] for n in neighbours[one]], place[one]) for one in row}
            row.sort(key=means.__getitem__)  # stable: ties keep their order
            place.update((one, float(index)) for index, one in enumerate(row))


def _columns(rows: list[list[Any]], above: _Neighbours, below: _Neighbours) -> dict[Any, float]:
    """Centres, near the mean of the neighbours' and not nearer to each other than they may be."""
    places: dict[Any, float] = {}
    for row in rows:
        places.update(zip(row, _spread(row, [0.0] * len(row)), strict=True))
    for sweep in range(2 * _SWEEPS):
        neighbours = below if sweep % 2 else above
        for row in rows[::-1] if sweep % 2 else rows:
            wanted = [_mean([places[n] for n in neighbours[one]], places[one]) for one in row]
            places.update(zip(row, _spread(row, wanted), strict=True))
    return places


def _spread(row: Sequence[Any], wanted: Sequence[float]) -> list[float]:
    """The places nearest to those wanted, by squares, that keep order and distance.

    Distances taken off, places may not decrease: an isotonic regression, by pooling neighbours.
    """
    offsets = [0.0]
    for left, right in pairwise(row):
        offsets.append(offsets[-1] + (_width(left) + _width(right)) / 2 + _GAP)
    pools: list[tuple[float, int]] = []  # mean, count
    for place, offset in zip(wanted, offsets, strict=True):
        mean, count = place - offset, 1
        while pools and pools[-1][0] > mean:
            other, size = pools.pop()
            mean, count = (mean * count + other * size) / (count + size), count + size
        pools.append((mean, count))
    flat = [mean for mean, count in pools for _ in range(count)]
    return [mean + offset for mean, offset in zip(flat, offsets, strict=True)]


def _mean(values: Sequence[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise
