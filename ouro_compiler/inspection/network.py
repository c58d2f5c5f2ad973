"""A graph as a networkx.DiGraph whose attributes are plain scalars, and GraphML of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ouro_compiler.errors import UsageError
from ouro_compiler.inspection.nodes import dtype_of, node_rows, shape_of

if TYPE_CHECKING:
    import networkx as nx

# Rows' keys that become attributes as they are.
_SCALARS = ("op", "kernel", "block", "layer", "bits", "outlier_bits", "reverse", "site")
_METADATA = "aten._assert_tensor_metadata"
_CAST = "aten.to.dtype"


def build_network(
    gm: fx.GraphModule,
    shares: Mapping[str, float | None] | None = None,
    kernels: Mapping[str, str] | None = None,
) -> nx.DiGraph:
    """Placeholders, calls and the output as nodes, in graph order; data flow as edges.

    shares, kernels: as for `node_rows`. Constants are no nodes: their names, joined by ", ", are
    the attribute `constants` of their readers. Other attributes, present where they apply: op,
    shape ("Bx50x48"; several outputs joined by ", "), dtype (likewise), kernel, block, layer,
    bits, outlier_bits, reverse, site, outlier_share, scale_min, scale_median, scale_max. An edge's
    `argument` names the operands that it feeds.
    """
    import networkx as nx

    rows = {row["name"]: row for row in node_rows(gm, shares, kernels)}
    network = nx.DiGraph()
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            continue
        network.add_node(node.name, **_attributes(node, rows.get(node.name, {"op": node.op})))
        for source in node.all_input_nodes:
            if source.op != "get_attr":
                network.add_edge(source.name, node.name, argument=_operands(node, source))
    return network


def fold_network(network: nx.DiGraph) -> nx.DiGraph:
    """A copy for reading, where edges pass over nodes that compute nothing.

    Left out: `getitem` of an op with several results, metadata assertions, and casts of constants,
    whose readers list the constants instead.
    """
    folded = network.copy()
    for name, data in network.nodes(data=True):
        sources = list(folded.predecessors(name))
        if data["op"] == "getitem" and len(sources) == 1:
            for user in list(folded.successors(name)):
                _add_operands(folded, sources[0], user, folded.edges[name, user]["argument"])
        elif data["op"] == _CAST and not sources and "constants" in data:
            for user in folded.successors(name):
                known = folded.nodes[user].get("constants")
                folded.nodes[user]["constants"] = _joined(known, data["constants"])
        elif data["op"] != _METADATA:
            continue
        folded.remove_node(name)
    return folded


def restrict_to_block(network: nx.DiGraph, block: str) -> nx.DiGraph:
    """The nodes of one block and their neighbours outside, with the edges that touch the block.

    Raises UsageError for a block that the network does not have.
    """
    inside = [name for name, of in network.nodes(data="block") if of == block]
    if not inside:
        known = ", ".join(blocks_of(network)) or "none"
        raise UsageError(f"no block is called {block}: the blocks of this graph are {known}")
    members = set(inside)
    edges = [edge for edge in network.edges if members & set(edge)]
    kept = members.union(*map(set, edges))
    # edge_subgraph and copy() keep no order that is promised: build anew in graph order.
    found = network.__class__()
    found.add_nodes_from((name, data) for name, data in network.nodes(data=True) if name in kept)
    found.add_edges_from((*edge, network.edges[edge]) for edge in edges)
    return found


def blocks_of(network: nx.DiGraph) -> list[str]:
    """Names of the blocks, each where its first node stands."""
    return list(dict.fromkeys(block for _, block in network.nodes(data="block") if block))


def to_graphml(network: nx.DiGraph) -> str:
    """GraphML text that `networkx.read_graphml` accepts."""
    import networkx as nx

    return "\n".join(nx.generate_graphml(network)) + "\n"


def _attributes(node: fx.Node, row: Mapping[str, Any]) -> dict[str, Any]:
    found = {key: row[key] for key in _SCALARS if row.get(key) is not None}
    value = node.meta.get("val")
    values = value if isinstance(value, (list, tuple)) else [value]
    # Outputs that were not asked for (values before quantization) are empty tensors.
    values = [one for one in values if shape_of(one) not in (None, [0])]
    shapes = [shape_of(one) or [] for one in values]
    if shapes:
        found["shape"] = ", ".join("x".join(map(str, one)) or "scalar" for one in shapes)
        found["dtype"] = ", ".join(filter(None, map(dtype_of, values)))
    if row.get("constants"):
        found["constants"] = ", ".join(row["constants"])
    if row.get("outlier_share") is not None:
        found["outlier_share"] = float(row["outlier_share"])
    found.update({f"scale_{key}": value for key, value in row.get("scale", {}).items()})
    return {key: _printable(value) for key, value in found.items()}


def _operands(node: fx.Node, source: fx.Node) -> str:
    """Schema names of the arguments in which `source` occurs; "" for what has no schema."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return ""
    names = [one.name for one in node.target._schema.arguments]
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return ", ".join(name for name in names if name in given and _holds(given[name], source))


def _holds(argument: Any, source: fx.Node) -> bool:
    if isinstance(argument, (list, tuple)):
        return any(_holds(one, source) for one in argument)
    return argument is source


def _add_operands(network: nx.DiGraph, source: str, user: str, operands: str) -> None:
    known = network.edges[source, user]["argument"] if network.has_edge(source, user) else None
    network.add_edge(source, user, argument=_joined(known, operands))


def _joined(*lists: str | None) -> str:
    """Lists of names joined by ", ", each name once."""
    names = [name for one in lists if one for name in one.split(", ")]
    return ", ".join(dict.fromkeys(names))


def _printable(value: Any) -> Any:
    """XML 1.0 has no control characters, and a state dict's names may."""
    if not isinstance(value, str):
        return value
    return "".join(one if one.isprintable() else "\N{REPLACEMENT CHARACTER}" for one in value)
