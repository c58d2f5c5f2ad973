"""`--ssm full` from the command line to a loaded artefact, on the trained example."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import ouro_compiler as ouro
from ouro_compiler.cli import compile_main
from tests.models import compiled_vim, images

EXAMPLES = Path(__file__).parent.parent / "examples"
TESTED = 100


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    """Some of the example's test images."""
    found = np.load(EXAMPLES / "digits_test.npz")
    path = tmp_path / "test.npz"
    np.savez(path, images=found["images"][:TESTED], labels=found["labels"][:TESTED])
    return path


@pytest.mark.parametrize(("preset", "accuracy", "decibels"), [("w8a8", 0.96, 24), ("w4a4", 0.9, 8)])
def test_digits(
    preset: str,
    accuracy: float,
    decibels: float,
    held_out: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, written = tmp_path / "out.pt2", tmp_path / "report.json"
    arguments = [str(EXAMPLES / "vim_digits.safetensors"), f"--{preset}", "--ssm", "full", "-q"]
    arguments += ["--calibration", str(EXAMPLES / "digits_calibration.npz"), "--images", "32"]
    arguments += ["--verify", str(held_out), "--strict", "-o", str(out), "--report", str(written)]
    monkeypatch.setattr(sys, "argv", ["ouro-compile", *arguments])
    with pytest.raises(SystemExit) as ended:
        compile_main()
        sys.exit(0)  # as a process whose main function returns
    assert not ended.value.code

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
    rows = {row["name"].rpartition(".")[2]: row for row in compiled.report["sites"]}
    assert rows["state"]["outlier_bits"] is None
    assert rows["input"]["outlier_bits"] is None
