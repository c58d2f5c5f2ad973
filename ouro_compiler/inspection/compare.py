"""What differs between two graphs, or between two reports: plain data, and text of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import fx

from ouro_compiler.errors import UsageError

if TYPE_CHECKING:
    import networkx as nx

Change = dict[str, tuple[Any, Any]]  # what changed: before and after


@dataclass(frozen=True, kw_only=True)
class Diff:
    """Differences between two things of one kind, in the order of the later one.

    added, removed: names that only one of them has. changed: by name, values before and after.
    totals: of the whole: bytes, SNR, numbers of layers. ops: of graphs, how many more or fewer
    nodes of an op there are; renamed: new names by old ones, which is no difference.
    """

    added: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    changed: dict[str, Change] = field(default_factory=dict)
    totals: Change = field(default_factory=dict)
    ops: dict[str, int] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.changed or self.totals)

    def __str__(self) -> str:
        return "\n".join(self.lines()) or "no difference"

    def lines(self) -> list[str]:
        """A line a difference: `+` added, `-` removed, `~` changed."""
        return [
            *(f"{key}: {_shown(a)} -> {_shown(b)}" for key, (a, b) in self.totals.items()),
            *(f"{op}: {count:+d}" for op, count in self.ops.items()),
            *(f"+ {name}" for name in self.added),
            *(f"- {name}" for name in self.removed),
            *(f"~ {name}: {_listed(change)}" for name, change in self.changed.items()),
        ]


def diff(before: Any, after: Any) -> Diff:
    """What changed from one graph, report or compiled model to another of the same kind.

    Graphs (`fx.GraphModule`, or networks of `build_network`) are compared node by node, by name.
    Reports (mappings, docs/report.md) and compiled models, by their reports, are compared layer by
    layer and site by site. Raises UsageError for two things of different kinds.
    """
    before, after = _comparable(before), _comparable(after)
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        return _diff_reports(before, after)
    if isinstance(before, Mapping) or isinstance(after, Mapping):
        raise UsageError("a graph and a report cannot be compared: pass two of one kind")
    return diff_networks(before, after)


def diff_networks(before: nx.DiGraph, after: nx.DiGraph) -> Diff:
    """Of two networks: nodes by name, with their inputs as one more attribute.

    Exporting a graph renames its nodes: one that is gone and one that is new, of the same op,
    layer, site and shape, are the same node, the first with the first.
    """
    same = _matched(before, after)
    rows = {name: _row(before, name, same) for name in before}
    new_rows = {name: _row(after, name, {}) for name in after}
    pairs = {new: _changes(rows[old], new_rows[new]) for old, new in same.items()}
    count = Counter(op for _, op in after.nodes(data="op"))
    count.subtract(Counter(op for _, op in before.nodes(data="op")))
    matched = set(same.values())
    return Diff(
        added=[name for name in after if name not in matched],
        removed=[name for name in before if name not in same],
        changed={name: pairs[name] for name in after if pairs.get(name)},
        totals={"nodes": (len(before), len(after))} if len(before) != len(after) else {},
        ops={op: number for op, number in sorted(count.items()) if number},
        renamed={old: new for old, new in same.items() if old != new},
    )


def _row(network: nx.DiGraph, name: str, renamed: Mapping[str, str]) -> dict[str, Any]:
    edges = network.in_edges(name, data="argument", default="")
    inputs = sorted(f"{argument} {renamed.get(source, source)}" for source, _, argument in edges)
    return {**network.nodes[name], "inputs": ", ".join(one.strip() for one in inputs)}


def _matched(before: nx.DiGraph, after: nx.DiGraph) -> dict[str, str]:
    """Which later node is which earlier one: by name and looks, by looks in order, by name."""

    def looks(data: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(data.get(one) for one in ("op", "block", "layer", "site", "shape"))

    old = {name: looks(data) for name, data in before.nodes(data=True)}
    new = {name: looks(data) for name, data in after.nodes(data=True)}
    found = {name: name for name in old if old[name] == new.get(name)}
    free: dict[tuple[Any, ...], list[str]] = {}
    for name in new:
        if name not in found:
            free.setdefault(new[name], []).append(name)
    for name in old:
        if name not in found and free.get(old[name]):
            found[name] = free[old[name]].pop(0)
    taken = set(found.values())
    left = [name for name in old if name not in found and name in new and name not in taken]
    return {**found, **{name: name for name in left}}


def _diff_reports(before: Mapping[str, Any], after: Mapping[str, Any]) -> Diff:
    rows = [
        {row["name"]: dict(row) for row in (*one["layers"]["rows"], *one["sites"])}
        for one in (before, after)
    ]
    totals = _changes(_totals(before), _totals(after))
    return Diff(**_compared(*rows), totals=totals)


def _totals(report: Mapping[str, Any]) -> dict[str, Any]:
    found = {
        "layers": report["layers"]["total"],
        "quantized layers": report["layers"]["quantized"],
        "bytes stored": report["bytes"]["stored"],
        "bytes as fp16": report["bytes"]["fp16"],
        "logits SNR (dB)": report["logits_snr_db"],
        "accuracy after": report["accuracy"]["after"],
        "outlier share": report["outlier_share"],
    }
    found |= {f"bytes of {part}": row["stored"] for part, row in report["bytes"]["by_part"].items()}
    return found


def _compared(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    changed = {name: _changes(before[name], row) for name, row in after.items() if name in before}
    return {
        "added": [name for name in after if name not in before],
        "removed": [name for name in before if name not in after],
        "changed": {name: change for name, change in changed.items() if change},
    }


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> Change:
    keys = dict.fromkeys((*after, *before))
    pairs = {key: (before.get(key), after.get(key)) for key in keys if key != "name"}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _comparable(one: Any) -> Any:
    """A network for a graph, a report for a compiled model; what is neither is refused."""
    from ouro_compiler.inspection.network import build_network

    if isinstance(one, fx.GraphModule):
        return build_network(one)
    if isinstance(one, Mapping):
        wanted: Sequence[str] = ("layers", "sites", "bytes")
        if all(key in one for key in wanted):
            return one
        raise UsageError(f"a report has {', '.join(wanted)}: this mapping has not (docs/report.md)")
    if isinstance(getattr(one, "report", None), Mapping):
        return one.report
    if hasattr(one, "predecessors"):
        return one
    raise UsageError(
        f"{type(one).__name__} cannot be compared: pass graphs, reports or compiled models"
    )


def _listed(change: Change) -> str:
    return ", ".join(f"{key} {_shown(a)} -> {_shown(b)}" for key, (a, b) in change.items())


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
