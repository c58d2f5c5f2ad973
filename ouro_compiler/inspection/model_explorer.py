"""A network in the JSON graph format of Model Explorer (github.com/google-ai-edge/model-explorer).

Blocks and modules are namespaces, which it folds; every attribute of a node is there as text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ouro_compiler.inspection.dot import short_op

if TYPE_CHECKING:
    import networkx as nx

# Said otherwise in the format, or of no use to a reader of one node.
_ELSEWHERE = frozenset({"shape", "dtype", "block"})


def to_model_explorer(network: nx.DiGraph, label: str) -> str:
    """JSON text of a collection of one graph. The same network gives the same text."""
    nodes = [_node(network, name, data) for name, data in network.nodes(data=True)]
    graph = {"id": label, "nodes": nodes}
    return json.dumps({"label": label, "graphs": [graph]}) + "\n"


def _node(network: nx.DiGraph, name: str, data: Mapping[str, Any]) -> dict[str, Any]:
    attributes = [
        {"key": key, "value": _text(value)} for key, value in data.items() if key not in _ELSEWHERE
    ]
    edges = [
        {
            "sourceNodeId": source,
            "sourceNodeOutputId": "0",
            "targetNodeInputId": str(number),
            "metadata": {"argument": argument},
        }
        for number, (source, _, argument) in enumerate(network.in_edges(name, data="argument"))
    ]
    shapes, kinds = (str(data.get(key, "")).split(", ") for key in ("shape", "dtype"))
    outputs = [
        {"id": str(number), "attrs": [{"key": "tensor_shape", "value": f"{kind}[{shape}]"}]}
        for number, (shape, kind) in enumerate(zip(shapes, kinds, strict=False))
        if shape
    ]
    return {
        "id": name,
        "label": short_op(str(data["op"])),
        "namespace": _namespace(data),
        "attrs": attributes,
        "incomingEdges": edges,
        "outputsMetadata": outputs,
    }


def _namespace(data: Mapping[str, Any]) -> str:
    """`layers.0/mixer/in_proj` for a layer, `layers.0` for another node of the block."""
    block = data.get("block")
    if not block:
        return ""
    place = str(data.get("layer") or block)
    inside = place.removeprefix(f"{block}.") if place.startswith(f"{block}.") else ""
    parts = [str(block), *(part for part in inside.split(".") if part)]
    return "/".join(part.replace("/", "_") for part in parts)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.6g}" if isinstance(value, float) else str(value)
