"""`ouro inspect`: formats, blocks and files of the command."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import networkx as nx
import pytest
from safetensors.torch import save_file

import ouro_compiler as ouro
from ouro_compiler.cli import main
from ouro_compiler.passes import NORMALIZE, PIPELINE
from ouro_compiler.passes.base import pass_name
from tests.dot_grammar import parse_dot
from tests.models import compiled_vim, images, small_vim

Inspect = Callable[..., tuple[int, str, str]]


@pytest.fixture
def inspect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Inspect:
    """Run `ouro inspect ARGS` beside vim.safetensors and vim.pt2: exit code, stdout, stderr."""
    state = {name: tensor.clone() for name, tensor in small_vim().state_dict().items()}
    save_file(state, tmp_path / "vim.safetensors")
    compiled_vim().save(tmp_path / "vim.pt2")
    monkeypatch.chdir(tmp_path)

    def run(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ouro", "inspect", *args])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_command_on_an_artefact(inspect: Inspect) -> None:
    code, out, err = inspect("vim.pt2", "--format", "graphml", "-o", "g.graphml")
    assert (code, out, err) == (0, "", "")
    network = nx.read_graphml("g.graphml")
    report = ouro.load("vim.pt2").manifest["report"]
    shares = {
        data["site"]: data["outlier_share"]
        for _, data in network.nodes(data=True)
        if "site" in data
    }
    assert shares == {row["name"]: row["outlier_share"] for row in report["sites"]}
    kernels = {row["name"]: row["kernel"] for row in report["layers"]["rows"] if row["kernel"]}
    found = {
        data["layer"]: data["kernel"] for _, data in network.nodes(data=True) if "layer" in data
    }
    assert {name: found[name] for name in kernels} == kernels
    code, out, err = inspect("vim.pt2", "--format", "dot")
    assert (code, err) == (0, "")
    assert parse_dot(out).clusters.keys() == {"cluster_layers.0"}
    assert not list(Path().glob("*.partial"))


def test_command_on_a_model(inspect: Inspect) -> None:
    args = (
        "vim.safetensors",
        "--format",
        "dot",
        "--after",
        pass_name(PIPELINE[-1]),
        "--block",
        "layers.0",
    )
    code, out, err = inspect(*args)
    assert (code, err) == (0, "")
    assert inspect(*args, "-o", "block.dot") == (0, "", "")
    assert Path("block.dot").read_text() == out
    parsed = parse_dot(out)
    outside = parsed.nodes.keys() - set(parsed.clusters["cluster_layers.0"])
    assert [parsed.nodes[name]["op"] for name in sorted(outside)] == [
        "aten.add.Tensor",
        "ouro.add_norm",
    ]


def test_block_and_output_of_the_other_formats(inspect: Inspect) -> None:
    whole = json.loads(inspect("vim.pt2", "--format", "json")[1])
    code, out, err = inspect("vim.pt2", "--format", "json", "--block", "layers.0", "-o", "b.json")
    assert (code, out, err) == (0, "", "")
    part = json.loads(Path("b.json").read_text())
    assert part["schema_version"] == whole["schema_version"] == 1
    assert part["report"] == whole["report"]
    assert 0 < len(part["nodes"]) < len(whole["nodes"])
    assert all(row in whole["nodes"] for row in part["nodes"])
    assert inspect("vim.pt2", "-o", "t.txt") == (0, "", "")
    assert Path("t.txt").read_text() == inspect("vim.pt2")[1]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (
            ("vim.pt2", "--format", "dot", "--block", "layers.1"),
            "blocks of this graph are layers.0",
        ),
        (("vim.pt2", "--block", "head"), "no block is called head"),
        (
            ("vim.pt2", "--format", "dot", "--after", pass_name(NORMALIZE[-1])),
            "--after is for models",
        ),
        (("vim.pt2", "--format", "dot", "-o", "no/such/g.dot"), "existing folder"),
        (("vim.pt2", "--format", "dot", "-o", "."), "existing folder"),
    ],
)
def test_bad_combinations_exit_2(inspect: Inspect, args: tuple[str, ...], words: str) -> None:
    code, out, err = inspect(*args)
    assert (code, out) == (2, "")
    assert words in err
    assert err.startswith("error: ")
    assert len(err.strip().splitlines()) == 1
    assert {path.name for path in Path().iterdir()} == {"vim.pt2", "vim.safetensors"}


def test_kernels_of_a_cuda_artefact(inspect: Inspect) -> None:
    example = images(2)
    ouro.compile(small_vim(), example, calibration=images(), target="cuda").save("cuda.pt2")
    code, out, _ = inspect("cuda.pt2", "--format", "json")
    assert code == 0
    kernels = {row["op"]: row["kernel"] for row in json.loads(out)["nodes"]}
    assert kernels["ouro.add_norm_quantize"] == "add_norm_quantize 4/8"
    assert kernels["ouro.linear_dynamic_outlier"].startswith("linear_dynamic_outlier int4 o8")
    assert kernels["ouro.dequantize_weight"] == "reference"
    assert kernels["aten.conv2d"] == "aten"
