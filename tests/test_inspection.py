"""Graphs for Graphviz and networkx: whole, truthful, the same every time, at every stage."""

from __future__ import annotations

import io
import shutil
import subprocess
from functools import lru_cache
from xml.etree import ElementTree

import networkx as nx
import pytest
import torch
from torch import fx

from ouro_compiler.compiler import graph_after
from ouro_compiler.config import Preprocessing, QuantConfig
from ouro_compiler.data import noise_images
from ouro_compiler.errors import UsageError
from ouro_compiler.inspection.dot import to_dot
from ouro_compiler.inspection.network import (
    blocks_of,
    build_network,
    fold_network,
    restrict_to_block,
    to_graphml,
)
from ouro_compiler.inspection.nodes import QUANTIZER_NAMES, node_rows
from ouro_compiler.inspection.places import block_names, block_of, layer_names
from ouro_compiler.passes import NORMALIZE, PIPELINE
from ouro_compiler.passes.base import pass_name
from tests.dot_grammar import parse_dot
from tests.models import compiled_vim, images, small_vim

STAGES = [pass_name(one) for one in PIPELINE]
NORMALIZED = pass_name(NORMALIZE[-1])
SCAN = "ouro.selective_scan_dynamic_outlier"


def captured(name: str, depth: int = 1) -> fx.GraphModule:
    preprocessing = Preprocessing(size=28, mean=(0.0,), std=(1.0,))
    noise = noise_images(preprocessing, 4, 0)
    return graph_after(small_vim(depth), images(2), name, calibration=noise)[0]


stage = lru_cache(maxsize=16)(captured)


def calls(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if node.op != "get_attr"]


def accepted_by_dot(text: str, nodes: set[str]) -> None:
    """Graphviz, where it is installed, draws exactly these nodes."""
    if shutil.which("dot") is None:
        return
    done = subprocess.run(["dot", "-Tsvg"], input=text.encode(), capture_output=True, check=True)
    assert done.stderr == b""
    svg = ElementTree.fromstring(done.stdout)
    space = "{http://www.w3.org/2000/svg}"
    drawn = [one for one in svg.iter(f"{space}g") if one.get("class") == "node"]
    assert len(drawn) == len(nodes)


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_in_both_formats(name: str) -> None:
    gm = stage(name)
    network = build_network(gm)
    assert list(network) == [node.name for node in calls(gm)]
    read = nx.read_graphml(io.BytesIO(to_graphml(network).encode()))
    assert dict(read.nodes(data=True)) == dict(network.nodes(data=True))
    assert list(read.edges(data=True)) == list(network.edges(data=True))
    inputs = {node.name: {one.name for one in node.all_input_nodes} for node in calls(gm)}
    assert all(source in inputs[user] for source, user in network.edges)
    folded = fold_network(network)
    text = to_dot(folded)
    parsed = parse_dot(text)
    assert parsed.nodes.keys() == set(folded)
    assert parsed.edges.keys() == set(folded.edges)
    assert set(parsed.clusters) == {"cluster_layers.0"}
    accepted_by_dot(text, set(folded))


@pytest.mark.parametrize("name", STAGES)
def test_ops_with_bits_show_them(name: str) -> None:
    """Whatever an op with bits is called, its row has them, and a quantizer's has its site."""
    rows = {row["name"]: row for row in node_rows(stage(name))}
    for node in calls(stage(name)):
        schema = getattr(node.target, "_schema", None)
        if schema is None or schema.name.partition("::")[0] != "ouro":
            continue
        held = {one.name for one in schema.arguments}
        row = rows[node.name]
        assert row["kernel"] == "reference"
        if held & {"bits", "inlier_bits"}:
            assert row["bits"] == 4
            assert row["scale"]["max"] >= row["scale"]["median"] > 0
        if row["op"] in QUANTIZER_NAMES:
            assert row["site"].startswith("layers.0.")


def test_attributes() -> None:
    compiled = compiled_vim()
    rows = compiled.manifest["report"]["layers"]["rows"]
    kernels = {row["name"]: "some_kernel" for row in rows if row["status"] == "quantized"}
    shares = {row["name"]: row["outlier_share"] for row in compiled.manifest["report"]["sites"]}
    network = build_network(compiled.graph_module, shares, kernels)
    linear = next(
        data
        for _, data in network.nodes(data=True)
        if data.get("layer") == "layers.0.mixer.in_proj"
    )
    assert linear["op"] == "ouro.linear_dynamic_outlier"
    assert linear["kernel"] == "some_kernel"
    assert (linear["bits"], linear["outlier_bits"], linear["reverse"]) == (4, 8, False)
    assert (linear["shape"], linear["dtype"], linear["block"]) == (
        "Bx50x192",
        "float32",
        "layers.0",
    )
    assert "layers.0.mixer.in_proj.qweight" in linear["constants"].split(", ")
    quantize = next(
        data
        for _, data in network.nodes(data=True)
        if data.get("site") == "layers.0.mixer.in_proj.input"
    )
    assert quantize["shape"] == "Bx50x48, Bx50, Bx5x48, Bx50x48"
    assert quantize["dtype"] == "int8, float32, uint8, float32"
    assert quantize["outlier_share"] == shares["layers.0.mixer.in_proj.input"]
    assert quantize["kernel"] == "reference"
    head = next(data for _, data in network.nodes(data=True) if data.get("layer") == "head")
    assert (head["kernel"], "block" in head) == ("aten", False)
    scan = next(name for name, op in network.nodes(data="op") if op == SCAN)
    named = {network.edges[edge]["argument"] for edge in network.in_edges(scan)}
    assert named == {"u", "delta", "A", "B", "C", "D"}


@pytest.mark.parametrize("ssm", ["none", "params"])
def test_layers_have_the_reports_names(ssm: str) -> None:
    """Every row of the report is one node of the artefact, whose metadata is gone."""
    compiled = compiled_vim(QuantConfig(ssm=ssm))
    found = sorted(layer_names(compiled.graph_module).values())
    assert found == sorted(row["name"] for row in compiled.manifest["report"]["layers"]["rows"])


def test_blocks_are_whole() -> None:
    """Both blocks of an artefact have the same ops, and nothing outside them is theirs."""
    network = build_network(compiled_vim(depth=2).graph_module)
    assert blocks_of(network) == ["layers.0", "layers.1"]
    ops = {
        block: sorted(data["op"] for _, data in network.nodes(data=True) if data.get("block") == of)
        for block, of in (("first", "layers.0"), ("second", "layers.1"), ("none", None))
    }
    assert ops["first"] == ops["second"]
    assert "aten.conv2d" in ops["none"]
    assert not any("selective_scan" in op for op in ops["none"])
    assert "ouro.linear_dynamic_outlier" not in ops["none"]


class Residual(torch.nn.Module):
    """Two blocks without norms, whose residual adds and activations read no constants."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))
        self.head = torch.nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + torch.nn.functional.silu(block(x))
        return self.head(x.mean(1) * torch.tensor(2.0))


def test_nodes_without_constants_stay_with_their_inputs() -> None:
    x = torch.randn(2, 3, 4)
    gm = torch.export.export(Residual().eval(), (x,)).module(check_guards=False)
    assert isinstance(gm, fx.GraphModule)
    found = block_names(gm)
    assert [found[name] for name in ("linear", "silu", "add")] == ["blocks.0"] * 3
    assert [found[name] for name in ("linear_1", "silu_1", "add_1")] == ["blocks.1"] * 3
    # The literal 2.0 is a constant of the graph, and says nothing about the place.
    assert [found[name] for name in ("mean", "mul", "linear_2")] == ["blocks.1", "blocks.1", None]


@pytest.mark.parametrize(
    ("constant", "block"),
    [
        ("layers.0.mixer.D", "layers.0"),
        ("stages.1.blocks.12.norm.weight", "stages.1"),
        ("norm_f.weight", None),
        ("pos_embed", None),
        ("conv1d.weight", None),
        ("weights.0", None),
    ],
)
def test_block_of(constant: str, block: str | None) -> None:
    assert block_of(constant) == block


def test_one_block_has_its_neighbours() -> None:
    network = build_network(stage(NORMALIZED, 3))
    part = restrict_to_block(network, "layers.1")
    inside = {name for name, block in network.nodes(data="block") if block == "layers.1"}
    edges = {edge for edge in network.edges if inside & set(edge)}
    assert set(part.edges) == edges
    assert set(part) == inside.union(*edges)
    assert {block for _, block in part.nodes(data="block")} == {"layers.0", "layers.1", "layers.2"}
    order = list(network)
    assert list(part) == sorted(part, key=order.index)
    with pytest.raises(UsageError, match=r"layers\.0, layers\.1, layers\.2"):
        restrict_to_block(network, "layers.7")


def test_folding_keeps_reachability() -> None:
    network = build_network(compiled_vim().graph_module)
    folded = fold_network(network)
    assert {op for _, op in network.nodes(data="op")} - {
        op for _, op in folded.nodes(data="op")
    } == {
        "getitem",
        "aten._assert_tensor_metadata",
        "aten.to.dtype",
    }
    for name in folded:
        assert nx.descendants(folded, name) == nx.descendants(network, name) & set(folded)
    linear = next(n for n, of in folded.nodes(data="layer") if of == "layers.0.mixer.in_proj")
    ((_, _, operands),) = folded.in_edges(linear, data="argument")
    assert operands == "codes, outlier_scale, outlier_start"
    patches = next(data for _, data in folded.nodes(data=True) if data["op"] == "aten.conv2d")
    assert patches["constants"] == "patch_embed.proj.weight, patch_embed.proj.bias"
    assert len(build_network(compiled_vim().graph_module)) == len(network)  # it was a copy


ODD = ['"', "\\", 'a\\"b', "a\\", "x\ny", "{", "<b>", "a&lt;", "", "größer", "graph", "->", "[a=1]"]


def test_odd_names_survive() -> None:
    network = nx.DiGraph()
    for name in ODD:
        network.add_node(name, op=f"aten.{name}", site=name, block=name or None, kernel="aten")
    network.add_edges_from((name, ODD[0], {"argument": name}) for name in ODD)
    text = to_dot(network)
    parsed = parse_dot(text)
    assert sorted(parsed.nodes) == sorted(ODD)
    assert set(parsed.edges) == set(network.edges)
    assert set(parsed.clusters) == {f"cluster_{name}" for name in ODD if name}
    assert all(parsed.nodes[name]["site"] == name for name in ODD)
    assert "a&amp;lt;" in parsed.nodes["a&lt;"]["label"]
    accepted_by_dot(text, set(ODD))


def test_control_characters_are_no_xml() -> None:
    owner = torch.nn.Module()
    owner.register_buffer("a\x01<b", torch.ones(2))
    graph = fx.Graph()
    x = graph.placeholder("x")
    constant = graph.get_attr("a\x01<b")
    graph.output(graph.call_function(torch.ops.aten.add.Tensor, (x, constant)))
    network = build_network(fx.GraphModule(owner, graph))
    read = nx.read_graphml(io.BytesIO(to_graphml(network).encode()))
    assert read.nodes["add_tensor"]["constants"] == "a\N{REPLACEMENT CHARACTER}<b"
    parse_dot(to_dot(network))


def test_the_grammar_is_strict() -> None:
    for wrong in (
        'digraph g { "a" [x="1"]; ',
        'digraph g { "a" [x="1"] } }',
        'digraph g { "a" [x="1"]; "a" [x="1"]; }',
        'digraph g { "a" [x=]; }',
        'digraph g { "a" [x="\\"]; }',
        'digraph g { "a" -> "b" [x="1"]; }',
        "digraph g { node; }",
    ):
        with pytest.raises((ValueError, IndexError)):
            parse_dot(wrong)


def test_labels_and_colours() -> None:
    parsed = parse_dot(to_dot(fold_network(build_network(stage(STAGES[-1])))))
    linear = next(n for n in parsed.nodes.values() if n.get("model_layer", "").endswith("in_proj"))
    assert linear["label"] == "linear_dynamic_outlier\nmixer.in_proj\nBx50x192, 4/8 bit"
    assert (linear["kernel"], linear["bits"], linear["tensor_shape"]) == (
        "reference",
        "4",
        "Bx50x192",
    )
    kinds = {
        kind: {n["fillcolor"] for n in parsed.nodes.values() if n["op"] == kind}
        for kind in (SCAN, "ouro.linear_dynamic_outlier", "ouro.add_norm")
    }
    quantize = {n["fillcolor"] for n in parsed.nodes.values() if n["op"] in QUANTIZER_NAMES}
    assert all(len(colours) == 1 for colours in (*kinds.values(), quantize))
    assert len(set.union(*kinds.values(), quantize)) == 4
    assert parsed.labels["cluster_layers.0"] == "layers.0"


def test_same_graph_same_bytes() -> None:
    """Of two captures of one model, and so of whatever order sets come in."""
    first, second = build_network(stage(STAGES[-1])), build_network(captured(STAGES[-1]))
    assert to_graphml(first) == to_graphml(second)
    assert to_dot(fold_network(first)) == to_dot(fold_network(second))
    one, two = (restrict_to_block(network, "layers.0") for network in (first, second))
    assert to_dot(one) == to_dot(two)
