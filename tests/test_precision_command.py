"""ouro-compile --refine, --mixed, --budget-mb, --min-snr and --replay."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ouro_compiler.cli.precision import verdict
from tests.command_line import Cli, cli, refused

__all__ = ["cli"]  # a fixture

BASE = ("vim.safetensors", "--calibration", "images.npz")


def test_a_budget_and_its_replay(cli: Cli) -> None:
    """The search's artefact and the replayed one are the same bytes."""
    result = cli(*BASE, "--budget-mb", "0.1", "--report", "r.json", "-q")
    assert (result.code, result.out, result.err) == (0, "", "")
    report = json.loads(Path("r.json").read_text())
    assert report["bytes"]["stored"] == report["mixed"]["bytes"] <= 100_000
    bits = {row["weight_bits"] for row in report["layers"]["rows"] if row["weight_bits"]}
    assert bits == {8}  # there is room for all
    assert report["seconds"]["mixed precision"] > 0
    replay = cli(*BASE, "--replay", "r.json", "-o", "again.pt2")
    assert replay.code == 0, replay.err
    assert Path("again.pt2").read_bytes() == Path("vim.w4a4.mixed.pt2").read_bytes()


def test_tables(cli: Cli) -> None:
    args = ("--min-snr", "12", "--refine", "--set", "refine.epochs=1", "--report", "r.json")
    result = cli(*BASE, *args, "--exclude", "*_proj*")
    assert result.code in (0, 5), result.err
    assert "SNR in dB of each layer alone" in result.out
    assert "layers.0.mixer.selective_scan" in result.out
    assert "W4A4" in result.out
    assert "before and after learning" in " ".join(result.out.split())
    report = json.loads(Path("r.json").read_text())
    assert report["config"]["refine"]["epochs"] == 1
    (row,) = report["refine"]["rows"]
    assert row["block"] == "layers.0"
    assert row["seconds"] > 0
    assert f"{row['loss_before']:.5f}" in result.out


def test_targets_that_cannot_be_met(cli: Cli) -> None:
    refused(cli(*BASE, "--budget-mb", "0.001", "-q"), 2, "MB cannot be reached")
    only = ("--include", "layers.0.mixer.in_proj", "-q")
    refused(cli(*BASE, *only, "--min-snr", "300"), 5, "300 are wanted")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--mixed",), "something to aim at"),
        (("--mixed", "--max-drop", "1"), "--max-drop needs --verify"),
        (("--budget-mb", "-1"), "a budget above 0"),
        (("--budget-mb", "1", "--dry-run"), "--dry-run does not measure"),
        (("--replay", "none.json"), "none.json: cannot be read"),
        (("--replay", "images.npz"), "images.npz: no report"),
        (("--replay", "empty.json"), "empty.json: no report"),
        (("--replay", "r.json", "--w8a8"), "leave out --w8a8"),
        (("--replay", "r.json", "--ssm", "none"), "leave out options of ssm"),
        (("--replay", "r.json", "--refine"), "leave out options of refine"),
        (("--replay", "r.json", "--budget-mb", "1"), "leave out the search"),
        (("--set", "overrides=a"), "cannot be set as text"),
    ],
)
def test_wrong_options(cli: Cli, args: tuple[str, ...], words: str) -> None:
    Path("empty.json").write_text("{}")
    Path("r.json").write_text(json.dumps({"config": {}}))
    refused(cli(*BASE, *args), 2, words)


def report_of(**changes: object) -> dict[str, object]:
    mixed = {"budget_bytes": None, "min_snr_db": None, **changes}
    return {
        "accuracy": {"before": 0.9, "after": 0.88},
        "bytes": {"stored": 2_000_000},
        "logits_snr_db": 20.0,
        "mixed": mixed,
    }


def test_verdicts() -> None:
    assert verdict(None, report_of()) is None
    assert verdict(2.0, report_of(budget_bytes=2_000_000, min_snr_db=20.0)) is None
    for found, words in (
        (verdict(1.9, report_of()), "fell by 2.00 points"),
        (verdict(2.0, report_of(budget_bytes=1_999_999)), "take 2 MB"),
        (verdict(2.0, report_of(min_snr_db=20.1)), "20.00 dB, 20.1 are wanted"),
    ):
        assert found is not None
        assert words in str(found)
        assert found.exit_code == 5
