"""`--ssm full` from the command line to a loaded artefact, on the trained example."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import ouro_compiler as ouro
from tests.command_line import Cli, cli
from tests.models import compiled_vim, images

__all__ = ["cli"]  # a fixture
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TESTED = 100


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    """Some of the example's test images."""
    found = np.load(EXAMPLES / "digits_test.npz")
    path = tmp_path / "digits.npz"
    np.savez(path, images=found["images"][:TESTED], labels=found["labels"][:TESTED])
    return path


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "accuracy", "decibels"), [("w8a8", 0.96, 24), ("w4a4", 0.9, 8)])
def test_digits(
    preset: str,
    accuracy: float,
    decibels: float,
    held_out: Path,
    tmp_path: Path,
    cli: Cli,
) -> None:
    out, written = tmp_path / "out.pt2", tmp_path / "report.json"
    arguments = (f"--{preset}", "--ssm", "full", "--images", "32", "--strict", "-o", str(out))
    data = ("--calibration", str(EXAMPLES / "digits_calibration.npz"), "--verify", str(held_out))
    model = str(EXAMPLES / "vim_digits.safetensors")
    result = cli(model, *arguments, *data, "--report", str(written))
    assert result.code == 0, result.err

    report = json.loads(written.read_text())
    assert report["config"]["ssm"] == "full"
    assert report["accuracy"]["after"] >= accuracy
    assert report["logits_snr_db"] >= decibels
    scans = [row for row in report["layers"]["rows"] if row["kind"] == "scan"]
    assert len(scans) == 2 * 4
    for row in scans:
        assert (row["status"], row["kernel"]) == ("simulated", "quantized_selective_scan")
        assert "the recurrence included" in row["reason"]
    names = {row["name"].rpartition(".")[2] for row in report["sites"]}
    assert {"delta", "B", "C", "z", "y", "decay", "input", "state"} <= names
    assert all(row["kernel"] != "reference" for row in report["kernels"]), report["kernels"]

    loaded = ouro.load(out)
    some = torch.from_numpy(np.load(held_out)["images"][:8])
    first = loaded(some)
    assert torch.equal(loaded(some), first), "from the graph, then from a tape"


@pytest.mark.parametrize("preset", [ouro.W4A4, ouro.W8A8], ids=["w4a4", "w8a8"])
def test_saved_and_loaded(preset: ouro.QuantConfig, tmp_path: Path) -> None:
    compiled = compiled_vim(dataclasses.replace(preset, ssm="full"))
    compiled.save(tmp_path / "full.pt2")
    loaded = ouro.load(tmp_path / "full.pt2")
    assert torch.equal(loaded(images(5, seed=2)), compiled(images(5, seed=2)))
    assert loaded.report == compiled.report
    assert loaded.report["config"]["ssm"] == "full"


def test_without_dynamic_outliers_nothing_is_listed_in_the_recurrence() -> None:
    spec = dataclasses.replace(ouro.W4A4.activations, outliers="none")
    compiled = compiled_vim(dataclasses.replace(ouro.W4A4, ssm="full", activations=spec))
    rows = {row["name"]: row for row in compiled.report["sites"]}
    for operand in ("decay", "input", "state"):
        row = rows[f"layers.0.mixer.selective_scan.{operand}"]
        assert (row["outlier_bits"], row["outlier_share"]) == (None, None)
