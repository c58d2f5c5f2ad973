"""The commands, run in this process beside a model, some images and labelled ones."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file

from ouro_compiler.cli import compile_main
from tests.models import images, small_vim


@dataclass
class Result:
    code: int
    out: str
    err: str


Cli = Callable[..., Result]


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run `ouro ARGS` (with entry=compile_main `ouro-compile ARGS`) beside a model."""
    state = {name: tensor.clone() for name, tensor in small_vim().state_dict().items()}
    save_file(state, tmp_path / "vim.safetensors")
    np.savez(tmp_path / "images.npz", images=images().numpy())
    labels = small_vim()(images(12, seed=4)).argmax(1).numpy()
    np.savez(tmp_path / "test.npz", images=images(12, seed=4).numpy(), labels=labels)
    monkeypatch.chdir(tmp_path)

    def run(*args: str, entry: Callable[[], None] = compile_main) -> Result:
        monkeypatch.setattr(sys, "argv", ["ouro", *args])
        code = 0
        try:
            entry()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


def refused(result: Result, code: int, words: str) -> None:
    """The exit code, one sentence on stderr, no result, no traceback, no artefact."""
    assert result.code == code, result.err
    assert words in result.err
    assert result.err.startswith("error: ")
    assert len(result.err.strip().splitlines()) == 1
    assert result.out == ""
    assert not list(Path().glob("*.pt2"))
    assert not list(Path().glob("*.partial"))
