"""The published JSON schema, and Model Explorer's format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import networkx as nx
import pytest

from ouro_compiler.cli import main
from ouro_compiler.inspection.model_explorer import to_model_explorer
from ouro_compiler.inspection.network import build_network
from tests.command_line import Cli, cli  # noqa: F401
from tests.models import compiled_vim

SCHEMA = json.loads((Path(__file__).parent.parent / "docs" / "graph.schema.json").read_text())


def errors(document: Any) -> list[str]:
    validator = jsonschema.Draft202012Validator(SCHEMA)
    return [error.message for error in validator.iter_errors(document)]


def test_json_is_what_the_schema_says(cli: Cli) -> None:  # noqa: F811
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    compiled_vim().save("vim.pt2")
    documents = {
        "artefact": cli("inspect", "vim.pt2", "--format", "json", entry=main),
        "block": cli("inspect", "vim.pt2", "--format", "json", "--block", "layers.0", entry=main),
        "model": cli("inspect", "vim.safetensors", "--format", "json", entry=main),
        "last": cli(
            *("inspect", "vim.safetensors", "--format", "json"),
            *("--after", "fuse_quantize_prologue"),
            entry=main,
        ),
    }
    for name, result in documents.items():
        assert result.code == 0, result.err
        document = json.loads(result.out)
        assert errors(document) == [], name
        assert document["nodes"]
    artefact = json.loads(documents["artefact"].out)
    names = [row["name"] for row in artefact["nodes"]]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"nodes": [{}]}, "required property"),
        ({"schema_version": 2}, "1 was expected"),
        ({"nodes": None}, "not of type 'array'"),
        ({"after": None}, "not of type 'string'"),
    ],
)
def test_the_schema_refuses(change: dict[str, Any], words: str) -> None:
    document = {"schema_version": 1, "after": "remove_noops", "nodes": []}
    assert errors(document) == []
    assert any(words in message for message in errors({**document, **change}))


def test_model_explorer_has_every_node_and_edge(cli: Cli) -> None:  # noqa: F811
    compiled_vim().save("vim.pt2")
    result = cli("inspect", "vim.pt2", "--format", "model-explorer", "-o", "m.json", entry=main)
    assert (result.code, result.out, result.err) == (0, "", "")
    found = json.loads(Path("m.json").read_text())
    assert found["label"] == "vim"
    (graph,) = found["graphs"]
    network = build_network(compiled_vim().graph_module)
    nodes = {node["id"]: node for node in graph["nodes"]}
    assert list(nodes) == list(network)
    edges = {
        (edge["sourceNodeId"], name): edge["metadata"]["argument"]
        for name, node in nodes.items()
        for edge in node["incomingEdges"]
    }
    assert edges == {(a, b): of for a, b, of in network.edges(data="argument")}
    linear = next(n for n in nodes.values() if n["namespace"] == "layers.0/mixer/in_proj")
    assert linear["label"] == "linear_dynamic_outlier"
    facts = {one["key"]: one["value"] for one in linear["attrs"]}
    assert (facts["bits"], facts["reverse"], facts["op"]) == (
        "4",
        "false",
        "ouro.linear_dynamic_outlier",
    )
    assert linear["outputsMetadata"][0]["attrs"] == [
        {"key": "tensor_shape", "value": "float32[Bx50x192]"}
    ]
    for node in nodes.values():
        assert {type(one["value"]) for one in node["attrs"]} == {str}
        block = network.nodes[node["id"]].get("block") or ""
        assert node["namespace"].split("/")[0] == block


def test_model_explorer_namespaces_are_no_paths() -> None:
    network = nx.DiGraph()
    network.add_node("a", op="aten.add.Tensor", block="x/y.0", layer="x/y.0.m/n")
    (node,) = json.loads(to_model_explorer(network, "l"))["graphs"][0]["nodes"]
    assert node["namespace"] == "x_y.0/m_n"
    assert node["outputsMetadata"] == []
