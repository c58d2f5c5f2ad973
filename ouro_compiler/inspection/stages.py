"""A graph after the capture and after every pass: what `compile(on_pass=...)` is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import fx

from ouro_compiler.inspection.network import build_network

if TYPE_CHECKING:
    import networkx as nx


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The network of a graph as a pass left it: its predecessor's, if it changed nothing."""

    name: str
    changed: bool
    network: nx.DiGraph


class StageRecorder:
    """Call it as `on_pass`: it keeps every stage, and the graph itself after the pass `keep`.

    The graph that is kept shares its constants; passes after it do not touch it.
    """

    def __init__(self, keep: str | None = None) -> None:
        self.stages: list[Stage] = []
        self.kept: fx.GraphModule | None = None
        self._keep = keep

    def __call__(self, name: str, changed: bool, gm: fx.GraphModule) -> None:
        changed = changed or not self.stages
        network = build_network(gm) if changed else self.stages[-1].network
        self.stages.append(Stage(name=name, changed=changed, network=network))
        if name == self._keep:
            self.kept = _copy(gm)


def _copy(gm: fx.GraphModule) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    graph.set_codegen(gm.graph._codegen)
    return fx.GraphModule(gm, graph)
