"""A graph's calls cut into blocks, by the names of the parameters they read.

A block of a model owns parameters below one numbered prefix ("layers.0", "layers.2.blocks.1"); the
longest such prefix with two quantized layers or more names it, so that the numbered parts of a
block (`mlp.0`) are not blocks of their own. The cuts are intervals of the graph's order: what reads
no parameter belongs to the block before it, and whatever reads parameters of no block (the stem,
the head, what stands between two stages) is a piece without a name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from ouro_compiler.graph import Site

_LAYERS = 2  # that make a block


@dataclass(frozen=True, kw_only=True)
class Block:
    """An interval of a graph's calls. name: "" outside blocks.

    outputs: its nodes that later ones read and that depend on one of its sites.
    """

    name: str
    calls: tuple[fx.Node, ...]
    sites: tuple[Site, ...]
    outputs: tuple[fx.Node, ...]

    @property
    def layers(self) -> list[str]:
        """Layers with a site in it, in order."""
        return list(dict.fromkeys(site.layer for site in self.sites))

    @property
    def label(self) -> str:
        """What it goes by in a report: its name, or its first layer's where it has none."""
        return self.name or self.layers[0]


def cut_into_blocks(gm: fx.GraphModule, sites: Sequence[Site]) -> list[Block]:
    """All calls of a graph, in order, as blocks and the pieces between them."""
    calls = [node for node in gm.graph.nodes if node.op == "call_function"]
    names = sorted(set(_block_names(sites).values()), key=len, reverse=True)
    owners = [_owner(node, names) for node in calls]
    last = {owner: index for index, owner in enumerate(owners) if owner}
    cuts: list[tuple[int, str]] = [(0, "")]
    for index, owner in enumerate(owners):
        current = cuts[-1][1]
        if owner is None or owner == current:
            continue
        is_new = bool(owner) and all(owner != name for _, name in cuts)
        has_ended = bool(current) and last[current] < index
        if is_new or (not owner and has_ended):
            cuts.append((index, owner))
    ends = [start for start, _ in cuts[1:]] + [len(calls)]
    pieces = zip(cuts, ends, strict=True)
    return [_block(name, calls[start:end], sites) for (start, name), end in pieces if end > start]


def _block_names(sites: Sequence[Site]) -> dict[str, str]:
    """The block of each quantized layer; layers without a numbered prefix are blocks themselves."""
    prefixes = {site.layer: _numbered_prefixes(site.layer) for site in sites}
    counts: dict[str, int] = {}
    for found in prefixes.values():
        for prefix in found:
            counts[prefix] = counts.get(prefix, 0) + 1
    names = {}
    for layer, found in prefixes.items():
        shared = [prefix for prefix in found if counts[prefix] >= _LAYERS]
        names[layer] = (shared or found[:1] or [layer])[-1]
    return names


def _numbered_prefixes(name: str) -> list[str]:
    """ "a.0.b.1.c" -> ["a.0", "a.0.b.1"], shortest first."""
    return [name[: found.end()] for found in re.finditer(r"\d+(?=\.|$)", name)]


def _owner(node: fx.Node, blocks: Sequence[str]) -> str | None:
    """Whose parameters a call reads: a block's name, "" for none of them, None for no parameter.

    blocks: their names, longest first.
    """
    owner = None
    for source in node.all_input_nodes:
        if source.op != "get_attr":
            continue
        read = str(source.target)
        found = next((one for one in blocks if read.startswith(f"{one}.") or read == one), "")
        owner = owner or found
    return owner


def _block(name: str, calls: Sequence[fx.Node], sites: Sequence[Site]) -> Block:
    inside = set(calls)
    mine = tuple(site for site in sites if site.node in inside)
    quantized = {site.node for site in mine}
    depends: set[fx.Node] = set()
    for node in calls:
        if node in quantized or any(source in depends for source in node.all_input_nodes):
            depends.add(node)
    outputs = [
        node for node in calls if node in depends and any(u not in inside for u in node.users)
    ]
    return Block(name=name, calls=tuple(calls), sites=mine, outputs=tuple(outputs))
