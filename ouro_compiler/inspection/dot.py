"""DOT text of a network, to be laid out by Graphviz: blocks as clusters, colours by kind of op."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ouro_compiler.inspection.network import blocks_of
from ouro_compiler.inspection.nodes import QUANTIZER_NAMES

if TYPE_CHECKING:
    import networkx as nx

_FLOAT = {"fillcolor": "white"}
_QUANTIZE = {"fillcolor": "#ffe0b2"}
_VIEW = {"shape": "plaintext", "style": "", "fontcolor": "#606060", "height": "0.2"}
_ENDS = {"shape": "oval", "fillcolor": "#e8e8e8"}
_STYLES = {
    **dict.fromkeys(QUANTIZER_NAMES, _QUANTIZE),
    "ouro.dequantize_dynamic_outlier": _QUANTIZE,
    "ouro.dequantize_weight": _QUANTIZE,
    "ouro.fake_quantize": _QUANTIZE,
    "ouro.linear_dynamic_outlier": {"fillcolor": "#bbdefb"},
    "ouro.quantized_selective_scan": {"fillcolor": "#c8e6c9"},
    "ouro.selective_scan": {"fillcolor": "#c8e6c9"},
    "ouro.selective_scan_dynamic_outlier": {"fillcolor": "#c8e6c9"},
    "placeholder": _ENDS,
    "output": _ENDS,
}
VIEWS = frozenset(
    (
        *("chunk", "expand", "flatten", "getitem", "permute", "reshape", "select", "slice"),
        *("split", "split_with_sizes", "squeeze", "sym_size", "transpose", "unflatten"),
        *("unsqueeze", "view"),
    )
)
# Words that mean something else to Graphviz.
_RENAMED = {"shape": "tensor_shape", "layer": "model_layer"}
# Operands that look alike in a picture and are not: their edges carry names.
_NAMED_EDGES = frozenset(
    (
        *("ouro.quantized_selective_scan", "ouro.selective_scan"),
        "ouro.selective_scan_dynamic_outlier",
    )
)


def to_dot(network: nx.DiGraph) -> str:
    """A `digraph` with one cluster a block. Attributes of nodes are kept beside those of the style.

    The same network gives the same text. Graphviz ignores attributes that it does not know.
    """
    return "\n".join(_lines(network)) + "\n"


def _lines(network: nx.DiGraph) -> Iterator[str]:
    yield "digraph ouro {"
    yield '  graph [rankdir=TB, nodesep=0.2, ranksep=0.25, fontname="Helvetica", fontsize=12];'
    yield '  node [shape=box, style=filled, fontname="Helvetica", fontsize=10, margin="0.1,0.04"];'
    yield '  edge [arrowsize=0.6, fontname="Helvetica", fontsize=9];'
    nodes = list(network.nodes(data=True))
    for name, data in nodes:
        if data.get("block") is None:
            yield f"  {_quoted(name)} {_listed(_node(data))};"
    for block in blocks_of(network):
        yield f"  subgraph {_quoted(f'cluster_{block}')} {{"
        yield f"    graph {_listed({'label': _label(block), 'color': '#909090'})};"
        for name, data in nodes:
            if data.get("block") == block:
                yield f"    {_quoted(name)} {_listed(_node(data))};"
        yield "  }"
    for source, user, data in network.edges(data=True):
        attributes = dict(data)
        if data.get("argument") and network.nodes[user]["op"] in _NAMED_EDGES:
            attributes["label"] = _label(f" {data['argument']}")  # clear of the line
        yield f"  {_quoted(source)} -> {_quoted(user)} {_listed(attributes)};"
    yield "}"


def _node(data: Mapping[str, Any]) -> dict[str, Any]:
    op = str(data["op"])
    style = _STYLES.get(op) or (_VIEW if short_op(op) in VIEWS else _FLOAT)
    plain = {_RENAMED.get(key, key): value for key, value in data.items()}
    return {"label": _label(*title(op, data)), **style, **plain}


def title(op: str, data: Mapping[str, Any]) -> Iterator[str]:
    """The lines on a node: op, layer or site within its block, shape and bits."""
    shapes = str(data.get("shape", ""))
    short = short_op(op)
    if short in VIEWS:
        yield from (short, shapes) if ", " in shapes else (f"{short} {shapes}".strip(),)
        return
    yield short
    shape = shapes.partition(",")[0]  # of codes or values; what follows goes with them
    place = str(data.get("site") or data.get("layer") or "")
    if place:
        yield place.removeprefix(f"{data.get('block')}.")
    facts = [shape] if shape else []
    if "bits" in data:
        wide = data.get("outlier_bits", 0)
        facts.append(f"{data['bits']}/{wide} bit" if wide else f"{data['bits']} bit")
    if "outlier_share" in data:
        facts.append(f"{100 * data['outlier_share']:.2f} % outliers")
    if facts:
        yield ", ".join(facts)


def short_op(op: str) -> str:
    """`add` for `aten.add.Tensor`."""
    return op.removeprefix("aten.").removeprefix("ouro.").partition(".")[0]


def _listed(attributes: Mapping[str, Any]) -> str:
    return f"[{', '.join(f'{key}={_quoted(value)}' for key, value in attributes.items())}]"


def _label(*lines: str) -> str:
    """Graphviz reads entities in labels, so a plain ampersand is one too."""
    return "\n".join(line.replace("&", "&amp;") for line in lines)


def _quoted(value: Any) -> str:
    """A DOT string. Backslashes are doubled: else a final one would escape the closing quote."""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    text = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{text}"'
