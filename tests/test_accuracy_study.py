"""Suites "accuracy", "outliers" and "fidelity" on small models, and the page made of their rows."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import ouro_compiler as ouro
from benchmarks import accuracy, accuracy_table, fidelity
from benchmarks.output import machine, write_rows
from benchmarks.published import ABLATION, IMAGENET
from benchmarks.registry import Row
from benchmarks.resume import Rows
from ouro_compiler.calibration.images import TensorImages
from ouro_compiler.frontend.capture import exported
from tests.models import images, small_vim


def options(**given: Any) -> argparse.Namespace:
    base = {"models": None, "seeds": "0", "filter": None, "json": None, "workers": 1, "images": 2}
    return argparse.Namespace(**{**base, **given})


@pytest.fixture
def examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a small model and labelled images, which the study takes for the examples."""
    state = {name: tensor.clone() for name, tensor in small_vim().state_dict().items()}
    save_file(state, tmp_path / "small_digits.safetensors")
    labels = small_vim()(images(40, seed=4)).argmax(1).numpy()
    held_out = images(40, seed=4).numpy()
    np.savez(tmp_path / "digits_test.npz", images=held_out, labels=labels)
    monkeypatch.setattr(accuracy, "EXAMPLES", tmp_path)
    monkeypatch.setattr(accuracy, "real_images", real_images)
    return tmp_path


def real_images(seed: int) -> Tensor:
    return images(16, seed=100 + seed)


def test_rows_of_the_study_and_the_page(
    examples: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = examples / "rows.json"
    wanted = "^fp32|^accuracy/.*/w4a4/rtn/real|^ablation/.*/w4a4/static"
    given = options(json=file, filter=wanted)
    rows = accuracy.accuracy(given)
    names = [row["row"] for row in rows]
    assert names == [
        "fp32/small_digits",
        "accuracy/small_digits/w4a4/rtn/real",
        "ablation/small_digits/w4a4/static",
    ]
    assert all(row["reason"] is None for row in rows), rows
    assert rows[0]["top1"] == 1.0  # the labels are its own
    assert rows[1]["batch"]["images"] == 16
    assert rows[1]["batch"]["difference"] < 1e-5
    assert rows[1]["outlier_share"] == 0 < rows[2]["outlier_share"]
    config = accuracy._with_outliers(ouro.W4A4, "static", 0)
    compiled = ouro.compile(small_vim(), images(2), config, calibration=real_images(0))
    labels = torch.from_numpy(np.load(examples / "digits_test.npz")["labels"])
    right = (compiled(images(40, seed=4)).argmax(1) == labels).double().mean()
    assert rows[2]["top1"] == float(right)

    # Cut off and started again: nothing is made twice, failed rows are tried again.
    stored = json.loads(file.read_text())["rows"]
    assert stored == json.loads(json.dumps(rows))
    capsys.readouterr()
    assert accuracy.accuracy(given) == stored
    assert capsys.readouterr().out == ""
    stored[0] = {**stored[0], "reason": "it broke"}
    write_rows(file, "accuracy", stored)
    again = accuracy.accuracy(given)
    assert [row["row"] for row in again] == [*names[1:], names[0]]
    with pytest.raises(SystemExit, match="suite accuracy, not outliers"):
        accuracy.outliers(given)

    monkeypatch.setattr(sys, "argv", ["accuracy_table", str(file)])
    accuracy_table.main()
    page = capsys.readouterr().out
    assert "### small_digits (floating point 100.0)" in page
    cell = f"{100 * rows[2]['top1']:.2f} / {rows[2]['logits_snr_db']:.1f}"
    assert f"| small_digits | W4A4 | {cell} |" in page
    assert f"| rtn | {100 * rows[1]['top1']:.2f} / {rows[1]['logits_snr_db']:.1f} |" in page
    assert "| rtn | " in page.partition("## Batch invariance")[2]


def test_a_model_with_injected_outliers(examples: Path) -> None:
    given = options(filter="fp32|/even/w4a4/dynamic")
    rows = accuracy.outliers(given)
    by_name = {row["row"].removeprefix("outliers/small_digits/"): row for row in rows}
    assert set(by_name) == {"none/fp32", "even/fp32", "uneven/fp32", "even/w4a4/dynamic"}
    assert by_name["none/fp32"]["injection_difference"] == 0
    assert 0 < by_name["even/fp32"]["injection_difference"] < 1e-5
    assert by_name["even/w4a4/dynamic"]["outlier_share"] > 0
    page = accuracy_table.page([("rows.json", {"rows": rows, "machine": machine()})])
    assert "| small_digits | even | W4A4 |" in page


def test_weights_that_were_trained_to_have_outliers(examples: Path) -> None:
    state = {name: tensor.clone() for name, tensor in small_vim().state_dict().items()}
    state["head.bias"] += 100 * torch.eye(10)[0]  # another model: all images are zeros to it
    save_file(state, examples / "small_outliers.safetensors")
    rows = accuracy.outliers(options(filter="/fp32|/trained/w4a4/none"))
    found = {row["row"].removeprefix("outliers/small_digits/"): row["top1"] for row in rows}
    zeros = float((np.load(examples / "digits_test.npz")["labels"] == 0).mean())
    assert zeros < 1
    assert found["trained/fp32"] == found["trained/w4a4/none"] == pytest.approx(zeros)
    assert found["none/fp32"] == found["even/fp32"] == 1
    assert accuracy.trained_models() == ["small_digits"]


@pytest.mark.slow
def test_processes_give_rows_too(tmp_path: Path) -> None:
    """Of a real example, without compiling, beside a process that fails."""
    file = tmp_path / "rows.json"
    given = options(models="vim_digits,gone", filter="^fp32", workers=2, json=file)
    with pytest.raises(SystemExit, match="gone stopped with exit code 1"):
        accuracy.accuracy(given)
    rows = json.loads(file.read_text())["rows"]
    assert [row["row"] for row in rows] == ["fp32/vim_digits"]
    assert rows[0]["top1"] == pytest.approx(0.982, abs=2e-3)


def made_up(name: str, seed: int, top1: float, reason: str | None = None) -> Row:
    keys = ("top1", "logits_snr_db", "calibration_seconds", "compile_seconds", "images_per_second")
    row = dict.fromkeys((*keys, "layers", "layers_quantized", "layers_simulated"), 1.0)
    size = {"bytes_fp16": 2e6, "bytes_stored": 1e6}
    return {**row, **size, "row": name, "seed": seed, "top1": top1, "reason": reason}


def test_means_spreads_and_failures_of_a_page() -> None:
    rows = [
        made_up("accuracy/m/w4a4/a/real", 0, 0.90),
        made_up("accuracy/m/w4a4/a/real", 1, 0.94),
        made_up("accuracy/m/w8a8/a/real", 0, 0.99),
        made_up("accuracy/m/w4a4/b/real", 0, 0.0, "no such thing"),
        made_up("accuracy/m/w4a4/a/synthetic", 0, 0.5),
    ]
    page = accuracy_table.page([("one.json", {"rows": rows, "machine": machine()})])
    assert "| a | 92.00 ± 2.83 / 1.0 ± 0.0 | 99.00 / 1.0 |" in page
    assert "| b | failed | - |" in page
    assert "- no such thing (`accuracy/m/w4a4/b/real`)" in page
    assert "| m W4A4 | a | 92.00 ± 2.83 / 1.0 ± 0.0 | 50.00 / 1.0 |" in page
    assert "## Batch invariance" not in page  # nothing was measured
    published = page.partition("## Published, not reproduced")[2]
    assert len(IMAGENET) + len(ABLATION) == sum(
        line.startswith("| ") and "(published)" not in line for line in published.splitlines()
    )
    assert "| Vim-T | 76.10 | OuroMamba | 128 synthetic | - | 74.98 | 74.84 | 63.49 |" in published


def test_errors_by_layer() -> None:
    program, given = exported(small_vim(), images(2)), (images(8), images(8, seed=1))
    fine = fidelity.layer_errors(program, images(2), ouro.W8A8, *given)
    coarse = fidelity.layer_errors(program, images(2), ouro.W4A4, *given)
    verify = TensorImages(given[1])
    compiled = ouro.compile(program, images(2), calibration=given[0], verify=verify)
    report = compiled.report  # of integer operators, which fuse what was simulated here
    assert coarse["logits_snr_db"] == pytest.approx(report["logits_snr_db"], abs=0.5)
    names = {row["name"] for row in report["layers"]["rows"] if row["status"] != "skipped"}
    assert {row["layer"] for row in coarse["layers"]} == names
    assert {row["kind"] for row in coarse["layers"]} == {"linear", "scan"}
    for first, second in zip(fine["layers"], coarse["layers"], strict=True):
        assert first["snr_db"] > second["snr_db"] > -5, first["layer"]
    moved = dataclasses.replace(ouro.W4A4, recipe="ksq")
    found = fidelity.layer_errors(program, images(2), moved, *given)["layers"]
    scans = {row["snr_db"] for row in found if row["kind"] == "scan"}
    assert scans == {None}  # their gates are behind them
    assert all(row["snr_db"] > -5 for row in found if row["kind"] == "linear")
    row = {"row": "fidelity/m/w4a4/a", "seed": 0, "images": 8, "reason": None, **coarse}
    page = accuracy_table.page([("f.json", {"rows": [row], "machine": machine()})])
    assert f"| m | W4A4 | a | {coarse['logits_snr_db']:.1f} |" in page


def test_rows_without_a_file_are_kept_in_memory() -> None:
    rows = Rows(None, "accuracy", "a/.*b")
    assert rows.wants("a/x/b", 0)
    assert not rows.wants("c", 0)
    rows.add({"row": "a/x/b", "seed": 0, "reason": None})
    assert not rows.wants("a/x/b", 0)
    assert rows.wants("a/x/b", 1)
