"""`ouro generate`, `ouro-compile` without images, and compile() without images."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import ouro_compiler as ouro
from ouro_compiler.cli import main
from ouro_compiler.cli.gallery import contact_sheet, to_pixels
from ouro_compiler.cli.plot import plot_curves
from ouro_compiler.config import Preprocessing
from ouro_compiler.data import open_images
from ouro_compiler.errors import ModelError, UsageError
from ouro_compiler.frontend.preprocessing import default_preprocessing
from tests.command_line import Cli, cli, refused
from tests.models import images, small_vim

__all__ = ["cli"]  # a fixture

TINY = ouro.SynthesisSpec(images=3, iterations=2, batch_size=2)
GREY = Preprocessing(size=28, mean=(0.5,), std=(0.5,))
GENERATE = ("generate", "vim.safetensors", "-o", "out", "--iterations", "2", "--no-cache")


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_generate_writes_images_arrays_losses_and_a_sheet(cli: Cli) -> None:
    result = cli(*GENERATE, "--images", "3", "--batch-size", "2", entry=main)
    assert result.code == 0, result.err
    assert result.out.strip().splitlines()[-1] == "out"
    out = Path("out")
    names = {f"images/000{index}.png" for index in range(3)}
    others = {"images.safetensors", "loss.json", "loss.svg", "contact_sheet.png"}
    assert contents(out).keys() == names | others
    arrays = load_file(out / "images.safetensors")
    assert arrays["images"].shape == (3, 1, 28, 28)
    assert (arrays["labels"].dtype, arrays["labels"].shape) == (torch.int64, (3,))
    for index, array in enumerate(arrays["images"]):
        found = np.asarray(Image.open(out / f"images/000{index}.png"))
        assert found.dtype == np.uint8
        assert np.abs(found / 255 - (array[0] * 0.5 + 0.5).numpy()).max() <= 0.5001 / 255
    losses = json.loads((out / "loss.json").read_text())
    assert losses["columns"] == ["total", "contrastive", "output", "variation"]
    assert len(losses["curve"]) == losses["synthesis"]["iterations"] == 2
    assert losses["preprocessing"]["size"] == 28
    assert ET.parse(out / "loss.svg").getroot().tag.endswith("svg")
    # An earlier output is replaced, and what it holds beyond the new one goes.
    assert cli(*GENERATE, "--images", "2", "-q", entry=main).out == ""
    assert contents(out).keys() == (names | others) - {"images/0002.png"}
    (out / "notes.txt").write_text("mine")
    found = cli(*GENERATE, entry=main)
    assert (found.code, "holds other files" in found.err) == (2, True)
    (out / "notes.txt").unlink()
    # What was written calibrates; its labels are no ground truth.
    calibration = ("--calibration", "out/images.safetensors", "--report", "r.json")
    result = cli("vim.safetensors", *calibration)
    assert result.code == 0, result.err
    report = json.loads(Path("r.json").read_text())
    assert report["calibration"]["images"] == 2
    assert report["calibration"]["synthesis"] is None
    assert report["accuracy"]["before"] is None
    Path("vim.w4a4.pt2").unlink()
    refused(cli("vim.safetensors", "--verify", "out/images.safetensors"), 2, "no labels")


def test_the_same_command_gives_the_same_files_and_no_cache_keeps_none(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("ouro_compiler.synthetic.cache_directory")
    for folder in ("out", "again"):
        args = [folder if word == "out" else word for word in GENERATE]
        assert cli(*args, "--images", "2", "-q", entry=main).code == 0
    assert contents(Path("out")) == contents(Path("again"))


def test_compile_without_images_synthesises_and_says_how_long(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ouro_compiler.synthetic.cache_directory", lambda kind: tmp_path / kind)
    args = ("vim.safetensors", "--images", "3", "--iterations", "5")
    first = cli(*args, "--report", "r.json")
    assert first.code == 0, first.err
    assert first.err.startswith("synthesising 3 images in 5 iterations: about ")
    assert first.err.endswith("; --images and --iterations shorten it\n")
    assert "3 synthetic images, made in 5 iterations" in first.out
    report = json.loads(Path("r.json").read_text())
    assert report["snr_data"] == report["calibration"]["description"] == "3 synthetic images"
    assert report["calibration"]["synthesis"]["iterations"] == 5
    assert "synthesise" in report["seconds"]
    artefact = Path("vim.w4a4.pt2").read_bytes()
    second = cli(*args, "--calibration", "synthetic", "-o", "again.pt2")
    assert second.err == "", "no step was taken"
    assert Path("again.pt2").read_bytes() == artefact
    assert len(contents(tmp_path / "synthetic")) == 1


def test_compile_default_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_vim()
    asked = []
    monkeypatch.setattr("ouro_compiler.compiler.SynthesisSpec", lambda: asked.append(True) or TINY)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    try:
        with torch.inference_mode():
            compiled = ouro.compile(model, images(2), cache=False)
        assert all(parameter.requires_grad for parameter in model.parameters())
    finally:
        model.requires_grad_(False)
    assert asked
    assert compiled.report["calibration"]["description"] == "3 synthetic images"
    assert compiled.report["calibration"]["synthesis"] == {
        **TINY.to_dict(),
        "variation_weight": 0.0,
    }
    assert compiled.manifest["report"].get("seconds") is None
    assert compiled(images(2)).shape == (2, 10)


def test_what_cannot_be_synthesised_is_refused_with_a_reason() -> None:
    flat = torch.nn.Sequential(torch.nn.Linear(6, 4))
    with pytest.raises(UsageError, match="only square images of 1 or 3 channels"):
        ouro.compile(flat, torch.zeros(2, 5, 6))
    pointwise = torch.nn.Sequential(torch.nn.Linear(8, 8))
    with pytest.raises(UsageError, match="pass calibration images"):
        ouro.compile(pointwise, torch.zeros(2, 3, 8, 8))
    with pytest.raises(UsageError, match="images of 3 channels, the model takes 1"):
        ouro.compile(pointwise, torch.zeros(2, 1, 8, 8), preprocessing=Preprocessing(size=8))
    with pytest.raises(ModelError):
        default_preprocessing(2, 8)


def test_two_processes_make_the_images_of_one(cli: Cli, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as torchrun's processes have: sums over threads differ in last bits
    args = (*GENERATE, "--images", "4", "--batch-size", "1")
    try:
        assert cli(*args, "-q", entry=main).code == 0
    finally:
        torch.set_num_threads(threads)
    expected = contents(Path("out"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [
        "--nproc-per-node",
        "2",
        "-m",
        "ouro_compiler",
        *("two" if word == "out" else word for word in args),
    ]
    home = str(Path(ouro.__file__).parent.parent)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": home}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=170)
    assert result.returncode == 0, result.stderr
    assert contents(Path("two")) == expected
    assert result.stdout.count("4 synthetic images") == 1


def test_processes_that_cannot_be_joined_are_refused(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(cli(*GENERATE, entry=main), 2, "start them with torchrun")


def test_pixels_are_clipped_and_sheets_are_grids() -> None:
    colours = Preprocessing(size=2)
    flat = torch.tensor([-9.0, 0.0, 9.0]).view(3, 1, 1, 1).expand(3, 3, 2, 2)
    pixels = to_pixels(flat, colours)
    assert pixels.shape == (3, 2, 2, 3)
    assert (pixels[0] == 0).all()
    assert pixels[1, 0, 0].tolist() == [124, 116, 104]
    assert (pixels[2] == 255).all()
    sheet = contact_sheet(pixels)
    assert (sheet.size, sheet.mode) == ((134, 134), "RGB")  # 2 x 2 cells of 64 and gaps of 2
    assert contact_sheet(np.zeros((100, 500, 500, 1), np.uint8)).size[0] <= 4098


def test_curves_without_a_logarithm_are_left_out() -> None:
    rows = [[100.0, 0.0, float("nan")], [10.0, 0.0, 2.0], [1.0, 0.0, -1.0]]
    svg = plot_curves(rows, ["total", "none", "odd"], "a < b")
    found = ET.fromstring(svg)
    texts = [one.text for one in found.iter() if one.tag.endswith("text")]
    assert "a < b" in texts
    assert "total: 1" in texts
    assert not any(text is not None and text.startswith("none") for text in texts)
    assert len([one for one in found.iter() if one.tag.endswith("polyline")]) == 2
    assert ET.fromstring(plot_curves([], ["total"], "nothing")) is not None


def test_labels_of_generated_arrays_are_not_read(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    arrays = {"images": images(2).clone(), "labels": torch.tensor([1, 2])}
    for metadata, read in ((None, True), ({"labels": "drawn at random"}, False)):
        save_file(arrays, tmp_path / "some.safetensors", metadata)
        labels = open_images(tmp_path / "some.safetensors", GREY).labels
        assert (labels is not None) == read
