"""A strict reader of the DOT language (https://graphviz.org/doc/info/lang.html), for tests.

Directed graphs without ports, HTML strings and comments; whatever else is not in the grammar is a
ValueError.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_KEYWORDS = {"node", "edge", "graph", "digraph", "subgraph", "strict"}
_TOKEN = re.compile(
    r'\s*(?:"(?P<quoted>(?:[^"\\]|\\.)*)"'
    r"|(?P<word>[A-Za-z_\u0080-\uffff][A-Za-z0-9_\u0080-\uffff]*|-?(?:\.\d+|\d+(?:\.\d*)?))"
    r"|(?P<mark>->|[{}\[\]=;,]))",
    re.DOTALL,
)


@dataclass
class Dot:
    """nodes: attributes by name, in order; clusters: member names by subgraph's name."""

    nodes: dict[str, dict[str, str]] = field(default_factory=dict)
    edges: dict[tuple[str, str], dict[str, str]] = field(default_factory=dict)
    clusters: dict[str, list[str]] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)


def parse_dot(text: str) -> Dot:
    """The graph. A node or an edge that is stated twice is a ValueError as well."""
    return _Parser(text).graph()


class _Parser:
    def __init__(self, text: str) -> None:
        self.tokens: list[tuple[str, str]] = []
        end = 0
        while text[end:].strip():
            match = _TOKEN.match(text, end)
            if match is None:
                raise ValueError(f"no token at {text[end : end + 40]!r}")
            assert match.lastgroup is not None
            self.tokens.append((match.lastgroup, match[match.lastgroup]))
            end = match.end()
        self.at = 0
        self.found = Dot()

    def graph(self) -> Dot:
        self.expect("digraph")
        self.name()
        self.statements(None)
        if self.at != len(self.tokens):
            raise ValueError(f"text after the graph: {self.tokens[self.at]}")
        return self.found

    def statements(self, cluster: str | None) -> None:
        self.expect("{")
        while not self.take("}"):
            self.statement(cluster)
            self.take(";")

    def statement(self, cluster: str | None) -> None:
        if self.take("subgraph"):
            name = self.name()
            if cluster is not None or name in self.found.clusters:
                raise ValueError(f"subgraph {name} is nested or stated twice")
            self.found.clusters[name] = []
            self.statements(name)
        elif self.take("graph"):
            self.found.labels[cluster or ""] = self.attributes().get("label", "")
        elif self.take("node") or self.take("edge"):
            self.attributes()
        else:
            self.node_or_edge(cluster)

    def node_or_edge(self, cluster: str | None) -> None:
        name = self.name()
        if self.take("->"):
            edge = (name, self.name())
            if edge in self.found.edges or not set(edge) <= self.found.nodes.keys():
                raise ValueError(f"edge {edge} is stated twice, or before its nodes")
            self.found.edges[edge] = self.attributes()
            return
        if name in self.found.nodes:
            raise ValueError(f"node {name} is stated twice")
        self.found.nodes[name] = self.attributes()
        if cluster is not None:
            self.found.clusters[cluster].append(name)

    def attributes(self) -> dict[str, str]:
        found: dict[str, str] = {}
        self.expect("[")
        while not self.take("]"):
            key = self.name()
            self.expect("=")
            if key in found:
                raise ValueError(f"attribute {key} is given twice")
            found[key] = self.name()
            self.take(",")
        return found

    def name(self) -> str:
        kind, text = self.tokens[self.at]
        if kind == "mark" or (kind == "word" and text.lower() in _KEYWORDS):
            raise ValueError(f"a name is missing before {text!r}")
        self.at += 1
        if kind == "word":
            return text
        return re.sub(r"\\(.)", lambda match: {"n": "\n"}.get(match[1], match[1]), text)

    def take(self, token: str) -> bool:
        """Step over a keyword or mark; a quoted one is a name."""
        if self.at < len(self.tokens) and self.tokens[self.at] in (
            ("mark", token),
            ("word", token),
        ):
            self.at += 1
            return True
        return False

    def expect(self, token: str) -> None:
        if not self.take(token):
            raise ValueError(f"{token!r} is missing at token {self.at}")
