"""`ouro tune` and `ouro_compiler.tune` where they cannot do anything: one sentence, an exit code.

What they do is in tests/kernels/cases_tuning.py.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import ouro_compiler as ouro
from ouro_compiler.cli import main
from ouro_compiler.cli.tune import short_choice
from ouro_compiler.errors import DeviceError, UsageError
from ouro_compiler.kernels import candidates
from ouro_compiler.runtime import tune as module
from tests.command_line import Cli, cli, refused
from tests.models import compiled_vim, images

__all__ = ["cli"]  # a fixture
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@no_gpu
def test_without_a_gpu(cli: Cli) -> None:
    words = "this machine has no CUDA device: run it where there is one"
    refused(cli("tune", "model.pt2", entry=main), 6, words)
    with pytest.raises(DeviceError, match=words):
        ouro.tune(compiled_vim())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--batches", "1,x"), "--batches 1,x: give sizes with commas, such as 1,32"),
        (("--batches", ""), "--batches : give sizes with commas"),
        (("--batches", "0"), "--batches 0: a batch is one image or more"),
        (("--json", "nowhere/found.json"), "--json nowhere/found.json: its folder does not exist"),
    ],
)
def test_options_that_cannot_be_used(cli: Cli, options: tuple[str, ...], words: str) -> None:
    refused(cli("tune", "model.pt2", *options, entry=main), 2, words)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the CPU were a device that kernels are tuned on: what is refused comes before that."""
    monkeypatch.setattr(module, "tuning_device", lambda: torch.device("cpu"))


@pytest.mark.usefixtures("here")
def test_what_is_no_artefact(cli: Cli) -> None:
    refused(cli("tune", "missing.pt2", entry=main), 3, "missing.pt2")
    refused(cli("tune", "vim.safetensors", entry=main), 3, "vim.safetensors")


@pytest.mark.usefixtures("here")
def test_a_model_elsewhere() -> None:
    with pytest.raises(UsageError, match="the model is on cpu: kernels are tuned on"):
        ouro.tune(compiled_vim())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batches": ()}, "batch sizes to tune for are 1 or more"),
        ({"batches": (0,)}, "batch sizes to tune for are 1 or more"),
        ({"budget": 0.0}, r"the budget of tuning is a number of seconds, got 0\.0"),
        ({"budget": math.nan}, "got nan"),
        ({"budget": math.inf}, "got inf"),
        ({"samples": 0}, "at least one sample"),
        ({"images": images(2)[:, :, :20]}, "this model was compiled for images of 28x28"),
    ],
)
def test_arguments_of_no_use(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        ouro.tune(compiled_vim(), **options)


def test_given_images_are_repeated() -> None:
    given = images(2)
    assert torch.equal(module._images(compiled_vim(), 3, given), given[[0, 1, 0]])
    noise = module._images(compiled_vim(), 3, None)
    assert noise.shape == (3, 1, 28, 28)
    assert torch.equal(noise, module._images(compiled_vim(), 3, None))


def test_choices_are_shown_short() -> None:
    choice = candidates.as_choice({"num_warps": 4, "BLOCK_M": 64, "num_stages": 2})
    assert short_choice(choice) == "M 64, stages 2, warps 4"
