"""Stages as compact JSON: what they share is written once.

A fact is a pair (attribute, value), a record a node with its facts and inputs, a layout the places
of a group of nodes; stages name them by number. Blocks of one structure share a layout.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from ouro_compiler.inspection.compare import Diff, diff_networks
from ouro_compiler.inspection.dot import short_op, title
from ouro_compiler.inspection.layout import lay_out
from ouro_compiler.inspection.network import fold_network
from ouro_compiler.inspection.stages import Stage

if TYPE_CHECKING:
    import networkx as nx

_Key = TypeVar("_Key", bound=Hashable)


class _Table(dict[_Key, int]):
    """Numbers of things, in the order in which they were first asked for."""

    def number(self, key: _Key) -> int:
        return self.setdefault(key, len(self))


def pack_stages(stages: Sequence[Stage]) -> dict[str, Any]:
    """Plain data: `names`, `facts`, `records`, `layouts` and `stages`.

    records: [name, [fact, ...], [input, operands, ...], [title line, ...]] with names, operands and
    titles as numbers in `names`. A stage: its groups [block, layout, [record, ...]] from top to
    bottom, where block is -1 for nodes outside blocks, and how it differs from the one before.
    """
    packer = _Packer()
    before: Stage | None = None
    packed = []
    for stage in stages:
        packed.append(packer.stage(stage, before))
        before = stage
    return {
        "names": list(packer.names),
        "facts": [list(one) for one in packer.facts],
        "records": [list(one) for one in packer.records],
        "layouts": packer.placed,
        "stages": packed,
    }


class _Packer:
    def __init__(self) -> None:
        self.names: _Table[str] = _Table()
        self.facts: _Table[tuple[int, Any]] = _Table()
        self.records: _Table[tuple[Any, ...]] = _Table()
        self.layouts: _Table[tuple[int, tuple[tuple[int, int], ...]]] = _Table()
        self.placed: list[list[Any]] = []
        self._last: tuple[Any, nx.DiGraph, list[Any]] | None = None

    def stage(self, stage: Stage, before: Stage | None) -> dict[str, Any]:
        found = {"name": stage.name, "changed": stage.changed, "nodes": len(stage.network)}
        if self._last is not None and self._last[0] is stage.network:
            return {**found, "groups": self._last[2], "diff": self._diff(Diff(), Diff())}
        network = fold_network(stage.network)
        groups = [self._group(network, block, nodes) for block, nodes in _groups(network)]
        if self._last is None or before is None:
            difference = self._diff(Diff(), Diff())
        else:
            whole = diff_networks(before.network, stage.network)
            difference = self._diff(diff_networks(self._last[1], network), whole)
        self._last = stage.network, network, groups
        return {**found, "groups": groups, "diff": difference}

    def _diff(self, drawn: Diff, whole: Diff) -> dict[str, Any]:
        number = self.names.number
        return {
            "added": [number(name) for name in drawn.added],
            "removed": [number(name) for name in drawn.removed],
            "changed": [number(name) for name in drawn.changed],
            "ops": whole.ops,
        }

    def _group(self, network: nx.DiGraph, block: str | None, nodes: list[str]) -> list[Any]:
        place = {name: index for index, name in enumerate(nodes)}
        edges = tuple(
            (place[source], place[user])
            for user in nodes
            for source in network.predecessors(user)
            if source in place
        )
        layout = self.layouts.number((len(nodes), edges))
        if layout == len(self.placed):
            self.placed.append(_placed(len(nodes), edges))
        records = [self.records.number(self._record(network, name)) for name in nodes]
        return [-1 if block is None else self.names.number(block), layout, records]

    def _record(self, network: nx.DiGraph, name: str) -> tuple[Any, ...]:
        data = network.nodes[name]
        number = self.names.number
        facts = tuple(
            self.facts.number((number(key), _short_number(value))) for key, value in data.items()
        )
        inputs = tuple(
            number(part)
            for source, _, argument in network.in_edges(name, data="argument")
            for part in (source, argument)
        )
        op = str(data["op"])
        lines = tuple(map(number, title(op, data))) or (number(short_op(op)),)
        return number(name), facts, inputs, lines


def _groups(network: nx.DiGraph) -> Iterator[tuple[str | None, list[str]]]:
    """Every block once, where its first node stands, and the runs of nodes outside blocks between.

    Nodes that nothing outside blocks feeds stand as low as they may: with their first reader.
    """
    members: dict[Any, list[str]] = {}
    run = 0
    seen: set[str] = set()
    for name, block in network.nodes(data="block"):
        if block is None:
            members.setdefault(("", run), []).append(name)
        else:
            if block not in seen:
                seen.add(block)
                run += 1
            members.setdefault(block, []).append(name)
    for key, nodes in members.items():
        yield (None if isinstance(key, tuple) else key), nodes


def _placed(count: int, edges: Sequence[tuple[int, int]]) -> list[Any]:
    """[width, height, [x, y, ...], [source, user, bend x, bend y, ...] of bent edges]."""
    import networkx as nx

    network = nx.DiGraph()
    network.add_nodes_from(range(count))
    network.add_edges_from(edges)
    found = lay_out(network)
    points = [number for index in range(count) for number in found.nodes[index]]
    bent = [
        [source, user, *(number for point in bends for number in point)]
        for (source, user), bends in found.edges.items()
        if bends
    ]
    return [found.width, found.height, points, bent]


def _short_number(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return float(f"{value:.4g}") if math.isfinite(value) else str(value)
