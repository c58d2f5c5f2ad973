"""`ouro eval`: counts against plain PyTorch, comparisons, several processes, refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import ouro_compiler as ouro
from ouro_compiler.cli import main
from ouro_compiler.config import Preprocessing
from ouro_compiler.data import noise_images, open_images
from ouro_compiler.errors import ModelError, UsageError, VerificationError
from ouro_compiler.evaluation import accuracy, snr_db
from ouro_compiler.runtime.compiled_model import CompiledModel
from ouro_compiler.scoring import label_ranks, score, worst_classes
from tests.command_line import Cli, cli, refused
from tests.models import compiled_vim, images, small_vim

__all__ = ["cli"]  # a fixture

GREY = Preprocessing(size=28, mean=(0.5,), std=(0.5,))
CPU = torch.device("cpu")
TIMES = {"seconds", "images_per_second", "timed_images"}


@pytest.fixture
def labelled(cli: Cli) -> Cli:
    """The command beside some.npz, 25 images of labels 0 to 7 drawn at random."""
    labels = torch.randint(0, 8, (25,), generator=torch.Generator().manual_seed(1))
    np.savez("some.npz", images=images(25, seed=3).numpy(), labels=labels.numpy())
    return cli


def class_folders(folder: Path, classes: int = 4, each: int = 3) -> Path:
    """Random grey pictures of several sizes in sub-folders of synsets; the last one is empty."""
    generator = np.random.default_rng(0)
    for label in range(classes):
        (folder / f"n{label:08d}").mkdir(parents=True)
        for number in range(each if label < classes - 1 else 0):
            pixels = generator.integers(0, 256, (30 + label, 40), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"n{label:08d}" / f"{number}.png")
    return folder


def evaluated(run: Cli, *args: str) -> dict[str, Any]:
    result = run("eval", *args, "--json", "r.json", "-q", entry=main)
    assert (result.code, result.out, result.err) == (0, "", "")
    return json.loads(Path("r.json").read_text())


def counted(logits: Tensor, labels: Tensor) -> tuple[int, int]:
    """Top-1 and top-5 counts, as PyTorch's own functions give them."""
    among = (logits.topk(5).indices == labels[:, None]).any(1)
    return int((logits.argmax(1) == labels).sum()), int(among.sum())


def without_times(found: Any) -> Any:
    if isinstance(found, dict):
        return {key: without_times(value) for key, value in found.items() if key not in TIMES}
    return [without_times(one) for one in found] if isinstance(found, list) else found


def test_arrays_give_the_counts_of_plain_torch(labelled: Cli) -> None:
    found = evaluated(labelled, "vim.safetensors", "--data", "some.npz", "--batch-size", "4")
    data = open_images("some.npz", GREY)
    assert data.labels is not None
    logits = small_vim()(images(25, seed=3))
    top1, top5 = counted(logits, data.labels)
    model = found["model"]
    assert model["kind"] == "floating point"
    assert model["correct"] == {"top1": top1, "top5": top5}
    assert model["top1"] == accuracy(logits, data.labels)
    assert (found["images"], found["classes"], found["outputs"], found["top_k"]) == (25, 8, 10, 5)
    assert found["against"] is found["agreement"] is found["logits_snr_db"] is None
    assert found["preprocessing"]["size"] == 28
    for row in model["per_class"]:
        own = data.labels == row["class"]
        assert row["images"] == int(own.sum())
        if own.any():
            assert row["top1"] == accuracy(logits[own], data.labels[own])
    # Six whole batches, of which the first two are cold, and a short one.
    assert model["timed_images"] == 16
    assert model["images_per_second"] > 0
    assert found["images_per_second"] > 0


def test_folders_of_synsets(cli: Cli) -> None:
    data = open_images(class_folders(Path("val")), GREY)
    assert data.class_names == tuple(f"n{label:08d}" for label in range(4))
    assert data.labels is not None
    assert data.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    found = evaluated(cli, "vim.safetensors", "--data", "val", "--batch-size", "4")
    logits = small_vim()(torch.cat(list(data.batches(9))))
    assert tuple(found["model"]["correct"].values()) == counted(logits, data.labels)
    rows = found["model"]["per_class"]
    assert [row["name"] for row in rows] == list(data.class_names)
    assert rows[3] == {**rows[3], "images": 0, "top1": None, "top5": None}
    assert "the first of the model's 10 classes" in found["notes"][0]
    fewer = evaluated(cli, "vim.safetensors", "--data", "val", "--images", "5", "--seed", "2")
    assert fewer["images"] == sum(row["images"] for row in fewer["model"]["per_class"]) == 5
    again = evaluated(cli, "vim.safetensors", "--data", "val", "--images", "5", "--seed", "2")
    assert without_times(again) == without_times(fewer)


def test_an_artefact_against_its_model(labelled: Cli) -> None:
    compiled = compiled_vim()
    compiled.save("m.pt2")
    args = ("--data", "some.npz", "--against", "vim.safetensors", "--batch-size", "10")
    found = evaluated(labelled, "m.pt2", *args)
    labels = torch.from_numpy(np.load("some.npz")["labels"])
    batches = images(25, seed=3).split(10)
    measured = torch.cat([compiled(batch) for batch in batches])
    reference = torch.cat([small_vim()(batch) for batch in batches])
    assert (found["model"]["kind"], found["against"]["kind"]) == ("artefact", "floating point")
    assert tuple(found["model"]["correct"].values()) == counted(measured, labels)
    assert tuple(found["against"]["correct"].values()) == counted(reference, labels)
    agreeing = int((measured.argmax(1) == reference.argmax(1)).sum())
    assert (found["agreeing"], found["agreement"]) == (agreeing, agreeing / 25)
    assert found["logits_snr_db"] == pytest.approx(snr_db(reference, measured), abs=1e-9)
    assert "does not say how images are prepared" in found["notes"][0]
    same = evaluated(labelled, "m.pt2", "--data", "some.npz", "--against", "m.pt2")
    assert (same["agreement"], same["logits_snr_db"]) == (1.0, None)


def test_an_artefact_prepares_images_as_its_manifest_says(cli: Cli) -> None:
    other = Preprocessing(size=28, mean=(0.1,), std=(0.3,), crop=1.0)
    manifest = {**compiled_vim().manifest, "preprocessing": other.to_dict()}
    compiled = CompiledModel(compiled_vim().program, manifest)
    compiled.save("m.pt2")
    folder = str(class_folders(Path("val")))
    found = evaluated(cli, "m.pt2", "--data", folder, "--against", "vim.safetensors")
    assert Preprocessing.from_dict(found["preprocessing"]) == other
    data = open_images(folder, other)
    assert data.labels is not None
    logits = compiled(torch.cat(list(data.batches(9))))
    assert tuple(found["model"]["correct"].values()) == counted(logits, data.labels)
    assert any("made for another mean" in note for note in found["notes"])


def test_what_is_printed(labelled: Cli) -> None:
    args = ("--data", "some.npz", "--against", "vim.safetensors", "--batch-size", "4")
    result = labelled("eval", "vim.safetensors", *args, entry=main)
    assert (result.code, result.err) == (0, "")
    for words in (
        "floating point",
        "top-1",
        "top-5",
        "no difference",
        "100.00 % (25 of 25)",
        "first 2 batches of each size are left out",
        "worst classes",
    ):
        assert words in result.out
    few = labelled("eval", "vim.safetensors", "--data", "some.npz", entry=main)
    assert "not timed: too few batches" in few.out


def test_an_exported_program(labelled: Cli) -> None:
    dynamic = ({0: torch.export.Dim("batch", min=1, max=64)},)
    program = torch.export.export(small_vim(), (images(2),), dynamic_shapes=dynamic)
    torch.export.save(program, "e.pt2")
    found = evaluated(labelled, "e.pt2", "--data", "some.npz", "--against", "vim.safetensors")
    assert found["model"]["kind"] == "floating point"
    assert found["agreement"] == 1.0
    torch.export.save(torch.export.export(small_vim(), (images(2),)), "fixed.pt2")
    result = labelled("eval", "fixed.pt2", "--data", "some.npz", entry=main)
    assert (result.code, "one batch size" in result.err) == (3, True)


def test_a_function(labelled: Cli) -> None:
    options = ("--model-arg", "depth=1", "--checkpoint", "vim.safetensors")
    found = evaluated(
        labelled, "ouro_compiler.models.vim:vim_micro", *options, "--data", "some.npz"
    )
    expected = evaluated(labelled, "vim.safetensors", "--data", "some.npz")
    assert found["model"]["kind"] == "floating point"
    assert found["model"]["correct"] == expected["model"]["correct"]


def test_two_processes_count_what_one_counts(labelled: Cli) -> None:
    state = {name: tensor.clone() for name, tensor in small_vim(2).state_dict().items()}
    save_file(state, "other.safetensors")
    args = ("vim.safetensors", "--data", "some.npz", "--against", "other.safetensors")
    args += ("--batch-size", "3")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as torchrun's processes have
    try:
        one = evaluated(labelled, *args)
    finally:
        torch.set_num_threads(threads)
    home = str(Path(ouro.__file__).parent.parent)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": home}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "ouro_compiler", "eval", *args, "--json", "two.json"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=170)
    assert result.returncode == 0, result.stderr
    two = json.loads(Path("two.json").read_text())
    assert (one.pop("processes"), two.pop("processes")) == (1, 2)
    assert without_times(two) == without_times(one)
    assert result.stdout.count("worst classes") == 1
    assert "2 processes" in result.stdout


def test_parts_add_up() -> None:
    generator = torch.Generator().manual_seed(0)
    data = noise_images(GREY, 11, seed=5)
    data.labels = torch.randint(0, 10, (11,), generator=generator)
    model = small_vim()
    whole = score([model], data, batch_size=2, device=CPU)
    parts = [score([model], data, batch_size=2, device=CPU, first=i, step=8) for i in range(8)]
    assert torch.equal(sum(part.hits for part in parts), whole.hits)
    assert [part.outputs for part in parts] == [10] * 6 + [0] * 2  # six batches for eight


def test_equal_logits_and_worst_classes() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0], [5.0, 0.0, 1.0]])
    assert label_ranks(logits, torch.tensor([2, 0, 1])).tolist() == [1, 0, 2]
    assert label_ranks(logits, logits.argmax(1)).tolist() == [0, 0, 0]
    rows = [
        {"class": label, "images": count, "top1": top1, "top5": top5}
        for label, (count, top1, top5) in enumerate(
            [(4, 0.5, 1.0), (0, None, None), (2, 0.5, 0.5), (3, 0.0, 0.0), (1, 0.5, 1.0)]
        )
    ]
    assert [row["class"] for row in worst_classes(rows, 10)] == [3, 2, 0, 4]
    assert [row["class"] for row in worst_classes(rows, 1)] == [3]


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (("vim.safetensors", "--data", "images.npz"), 2, "no labels"),
        (("vim.safetensors", "--data", "gone"), 2, "does not exist"),
        (("vim.safetensors", "--data", "many.npz"), 2, "12 classes, the model knows 10"),
        (("vim.safetensors", "--data", "wide.npz"), 2, "must have shape"),
        (("vim.safetensors", "--data", "negative.npz"), 2, "must not be negative"),
        (("vim.safetensors", "--data", "damaged"), 2, "0.png cannot be read"),
        (("vim.safetensors", "--data", "test.npz", "--json", "no/r.json"), 2, "existing folder"),
        (("vim.safetensors", "--data", "test.npz", "--model-arg", "a=1"), 2, "is a file"),
        (("gone.pt2", "--data", "test.npz"), 3, "gone.pt2"),
        (("vim.safetensors", "--data", "test.npz", "--against", "gone.pt2"), 3, "gone.pt2"),
    ],
)
def test_refusals(cli: Cli, args: tuple[str, ...], code: int, words: str) -> None:
    some = images(12, seed=4).numpy()
    np.savez("many.npz", images=some, labels=np.arange(12))
    np.savez("negative.npz", images=some, labels=np.arange(12) - 1)
    np.savez("wide.npz", images=np.zeros((2, 1, 28, 30), np.float32), labels=np.arange(2))
    whole = class_folders(Path("damaged")) / "n00000001" / "0.png"
    whole.write_bytes(whole.read_bytes()[:100])
    refused(cli("eval", *args, entry=main), code, words)


def test_folders_of_more_classes_than_outputs(cli: Cli) -> None:
    class_folders(Path("val"), classes=11, each=1)  # the eleventh is empty, and still a class
    args = ("eval", "vim.safetensors", "--data", "val")
    refused(cli(*args, entry=main), 2, "11 classes, the model knows 10")


def test_options_of_models_are_not_for_artefacts(cli: Cli, tmp_path: Path) -> None:
    compiled_vim().save("m.pt2")
    result = cli("eval", "m.pt2", "--data", "test.npz", "--ema", entry=main)
    assert (result.code, "compiled already" in result.err) == (2, True)
    Path("m.pt2").write_bytes(Path("m.pt2").read_bytes()[:5000])
    assert cli("eval", "m.pt2", "--data", "test.npz", entry=main).code == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is there")
def test_missing_device_exits_6(cli: Cli) -> None:
    args = ("eval", "vim.safetensors", "--data", "test.npz", "--device", "cuda")
    refused(cli(*args, entry=main), 6, "no CUDA device")


class Odd(torch.nn.Module):
    def __init__(self, outputs: Any) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, x: Tensor) -> Any:
        return self.outputs(x)


def failing(x: Tensor) -> Tensor:
    raise RuntimeError("no memory\nfor this")


def test_models_that_cannot_be_scored() -> None:
    data = noise_images(GREY, 4, seed=0)
    data.labels = torch.tensor([0, 1, 2, 3])
    for outputs, error, words in (
        (lambda x: x, ModelError, "shape .2, 1, 28, 28."),
        (lambda x: {"logits": x}, ModelError, "gives dict"),
        (failing, ModelError, r"fails on images .2, 1, 28, 28. .RuntimeError: no memory.$"),
        (lambda x: x.flatten(1) * float("nan"), VerificationError, "not finite"),
    ):
        with pytest.raises(error, match=words):
            score([Odd(outputs)], data, batch_size=2, device=CPU)
    two = [Odd(lambda x: x.flatten(1)), Odd(lambda x: (x.flatten(1)[:, :9],))]
    assert score(two[1:], data, batch_size=2, device=CPU).outputs == 9
    with pytest.raises(UsageError, match="784 and 9 outputs"):
        score(two, data, batch_size=2, device=CPU)
