"""`ouro compare`: rows against compile() and plain PyTorch, failures, resuming, refusals."""

from __future__ import annotations

import csv
import dataclasses
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import ouro_compiler as ouro
from ouro_compiler import synthetic
from ouro_compiler.cli import main
from ouro_compiler.cli.compare_plot import plot_accuracy
from ouro_compiler.cli.compare_table import markdown
from ouro_compiler.comparison import MEASURED
from ouro_compiler.errors import UsageError
from ouro_compiler.evaluation import snr_db
from ouro_compiler.recipes import RECIPES
from tests.command_line import Cli, cli, refused
from tests.models import images, small_vim

__all__ = ["cli"]  # a fixture

MODEL = ("compare", "vim.safetensors", "--data", "test.npz", "--calibration", "images.npz")
SVG = "{http://www.w3.org/2000/svg}"


def read(path: str = "r.json") -> dict[str, Any]:
    return json.loads(Path(path).read_text())


def test_rows_are_what_compiling_and_evaluating_give(cli: Cli) -> None:
    entry = "ouromamba:activations.outliers=static:ssm=none"
    files = ("--json", "r.json", "--csv", "r.csv", "--markdown", "r.md", "--plot", "r.svg")
    args = ("--recipes", f"rtn,{entry}", "--bits", "w4a4", "--batch-size", "5", "--seeds", "3")
    result = cli(*MODEL, *args, *files, entry=main)
    assert result.code == 0, result.err
    assert "2 of 2: ouromamba:activations.outliers=static:ssm=none w4a4 seed 3" in result.err
    found = read()
    assert [(row["recipe"], row["bits"], row["seed"]) for row in found["rows"]] == [
        ("rtn", "w4a4", 3),
        (entry, "w4a4", 3),
    ]
    config = dataclasses.replace(
        ouro.W4A4,
        ssm="none",
        seed=3,
        activations=dataclasses.replace(ouro.W4A4.activations, outliers="static"),
    )
    row = found["rows"][1]
    assert ouro.QuantConfig.from_dict(row["config"]) == config
    compiled = ouro.compile(small_vim(), images(2), config, calibration=images(), batch_size=5)
    data = np.load("test.npz")
    labels = torch.from_numpy(data["labels"])
    batches = torch.from_numpy(data["images"]).split(5)
    reference = torch.cat([small_vim()(batch) for batch in batches])
    measured = torch.cat([compiled(batch) for batch in batches])
    right = float((measured.argmax(1) == labels).double().mean())
    assert row["top1"] == right
    assert row["top5"] == float((measured.topk(5).indices == labels[:, None]).any(1).float().mean())
    assert row["drop"] == pytest.approx(100 * (1 - right))  # the labels are the model's own
    assert row["agreement"] == right
    assert row["logits_snr_db"] == pytest.approx(snr_db(reference, measured), abs=1e-6)
    assert row["bytes_stored"] == compiled.report["bytes"]["stored"]
    assert row["outlier_share"] == compiled.report["outlier_share"] > 0
    assert found["floating_point"]["top1"] == 1.0
    assert found["rows"][0]["outlier_share"] == 0
    with Path("r.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["recipe"] for line in lines] == ["floating point", "rtn", entry]
    assert float(lines[2]["logits_snr_db"]) == row["logits_snr_db"]
    assert Path("r.md").read_text() == markdown(found)
    assert f"| {entry} | W4A4 | 1 | {100 * right:.2f} |" in Path("r.md").read_text()
    circles = ElementTree.parse("r.svg").getroot().iter(f"{SVG}circle")
    assert len(list(circles)) == 4  # two marks and two of the legend


def test_a_row_that_fails_is_a_row_and_is_tried_again(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise UsageError("this method wants more images")

    def break_down(*args: Any, **kwargs: Any) -> Any:
        raise ZeroDivisionError("division by zero")

    before = RECIPES["rtn"]
    args = ("--recipes", "rtn,ouromamba", "--json", "r.json", "-q")
    monkeypatch.setitem(RECIPES, "rtn", dataclasses.replace(before, calibrate=refuse))
    result = cli(*MODEL, *args, entry=main)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error: 1 of 2 runs failed, the first is rtn w4a4: this method")
    first = read()
    assert first["rows"][0]["reason"] == "this method wants more images"
    assert all(first["rows"][0][name] is None for name in MEASURED)
    assert first["rows"][1]["reason"] is None
    assert "- rtn W4A4, seed 0: this method wants more images" in markdown(first)
    assert "| rtn | W4A4 | 0 of 1 | - |" in markdown(first)
    assert plot_accuracy(first).count("<circle") == 3

    monkeypatch.setitem(RECIPES, "rtn", dataclasses.replace(before, calibrate=break_down))
    result = cli(*MODEL, *args, "--resume", entry=main)
    assert result.code == 1
    assert "ZeroDivisionError: division by zero" in result.err

    monkeypatch.setitem(RECIPES, "rtn", before)
    result = cli(*MODEL, *args, "--resume", entry=main)
    assert (result.code, result.err) == (0, "")
    rows = read()["rows"]
    assert [row["recipe"] for row in rows] == ["ouromamba", "rtn"]  # kept, and made now
    assert rows[0] == first["rows"][1]  # times too: it was not run again
    assert all(row["reason"] is None for row in rows)


class Refusing:
    """Calibration that fails at once, and what images it was given."""

    def __init__(self) -> None:
        self.images: list[Any] = []

    def __call__(self, gm: Any, plan: Any, config: Any, images: Any, **kwargs: Any) -> Any:
        self.images.append(images)
        raise UsageError("not today")


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> Refusing:
    """Every recipe refuses: rows are quick, and all of them fail."""
    found = Refusing()
    for name, recipe in RECIPES.items():
        monkeypatch.setitem(RECIPES, name, dataclasses.replace(recipe, calibrate=found))
    return found


def test_another_model_is_not_resumed(cli: Cli, refusing: Refusing) -> None:
    args = ("--recipes", "rtn", "--json", "r.json", "-q")
    assert cli(*MODEL, *args, entry=main).code == 2  # its row is kept all the same
    other = {name: tensor.clone() for name, tensor in small_vim(2).state_dict().items()}
    save_file(other, "vim.safetensors")
    before = Path("r.json").read_text()
    refused(cli(*MODEL, *args, "--resume", entry=main), 2, "made with another model_sha256")
    changed = (*MODEL, *args, "--resume", "--images", "8", "--set", "ssm=none")
    refused(cli(*changed, entry=main), 2, "calibration_images, settings")
    assert Path("r.json").read_text() == before
    Path("r.json").write_text("[1]")
    refused(cli(*MODEL, *args, "--resume", entry=main), 2, "no result of ouro compare")


def test_images_are_synthesised_once_a_seed(
    cli: Cli, refusing: Refusing, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        made.append(args[2].seed)
        return before(*args, **kwargs)

    before = synthetic.synthetic_images
    monkeypatch.setattr(synthetic, "synthetic_images", counted)
    args = ("--images", "2", "--iterations", "1", "--seeds", "5,6", "--no-cache")
    some = ("compare", "vim.safetensors", "--data", "test.npz", "--recipes", "rtn,ouromamba")
    result = cli(*some, *args, "--json", "r.json", "-q", entry=main)
    assert (result.code, made) == (2, [5, 6])
    assert [row["seed"] for row in read()["rows"]] == [5, 6, 5, 6]
    first, second, again, _ = refusing.images
    assert first is again
    assert not torch.equal(*(next(one.batches(2)) for one in (first, second)))


def test_means_over_seeds() -> None:
    row = {"recipe": "a|b", "bits": "w4a4", "reason": None, **dict.fromkeys(MEASURED)}
    tops = [0.90, 0.94, None]
    rows = [{**row, "seed": seed, "top1": top} for seed, top in enumerate(tops)]
    rows[2]["reason"] = "it broke"
    made = {"model": "m", "data": "d", "calibration": "noise", "calibration_images": 2}
    result = {
        "made": {**made, "device": "cpu", "batch_size": 4},
        "floating_point": {"top1": 0.99, "top5": 1.0, "images_per_second": None},
        "top_k": 3,
        "rows": rows,
    }
    shown = markdown(result)
    assert "| top-3 % |" in shown
    assert "| a\\|b | W4A4 | 2 of 3 | 92.00 ± 2.83 | - |" in shown
    assert "- a\\|b W4A4, seed 2: it broke" in shown
    circles = ElementTree.fromstring(plot_accuracy(result)).iter(f"{SVG}circle")
    assert len(list(circles)) == 2


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--recipes", "rtn,nosuch"), "no recipe is called 'nosuch'"),
        (("--recipes", ","), "--recipes needs at least one name"),
        (("--recipes", "rtn:ssm"), "a setting is written name=value"),
        (("--recipes", "rtn:activations.nosuch=1"), "no setting activations.nosuch"),
        (("--recipes", "rtn:seed=1"), "--recipes and --seeds say that"),
        (("--set", "recipe=rtn"), "--recipes and --seeds say that"),
        (("--bits", "w4a4,w3a3"), "no preset is called 'w3a3'"),
        (("--seeds", "0,x"), "whole numbers"),
        (("--resume",), "--resume needs --json"),
        (("--json", "no/r.json"), "existing folder"),
        (("--json", "r", "--csv", "./r"), "the same name"),
        (("--iterations", "5"), "--iterations is for synthetic images"),
        (("--data", "images.npz"), "no labels"),
    ],
)
def test_refusals(cli: Cli, args: tuple[str, ...], words: str) -> None:
    refused(cli(*MODEL, *args, entry=main), 2, words)


def test_a_damaged_source_of_images_ends_the_command(cli: Cli) -> None:
    """What is wrong with every row is said once."""
    np.savez("images.npz", images=np.zeros((3, 1, 20, 20), np.float32))
    refused(cli(*MODEL, "-q", entry=main), 2, "must have shape")
