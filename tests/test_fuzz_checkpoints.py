"""Damaged checkpoints: one sentence and exit code 3, or the weights that are in the file."""

from __future__ import annotations

import argparse
import sys
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ouro_compiler.cli import compile_main
from ouro_compiler.errors import ModelError
from ouro_compiler.frontend.checkpoint import load_model
from ouro_compiler.models.vim import Vim, vim_micro
from tests.helpers import REPEATABLE

FORMATS = ("plain", "training", "legacy", "safetensors")
FUZZ = settings(REPEATABLE, max_examples=300)


@lru_cache
def content(format: str, folder: Path) -> bytes:
    """A small Vim's checkpoint in one of FORMATS."""
    torch.manual_seed(0)
    state = vim_micro(depth=1, embed_dim=16).state_dict()
    path = folder / f"{format}.pth"
    if format == "safetensors":
        save_file(state, path, metadata={"architecture": "vim_micro"})
    elif format == "training":
        torch.save({"model": state, "args": argparse.Namespace(lr=0.1), "epoch": 3}, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=format != "legacy")
    return path.read_bytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def load(damaged: bytes, folder: Path) -> None:
    """Load it: weights of the right shapes, or a ModelError of one line that names the file."""
    path = folder / "damaged.pth"
    path.write_bytes(damaged)
    refusal: ModelError | None = None
    try:
        loaded = load_model(path)
    except ModelError as error:
        refusal = error
    if refusal is not None:
        assert str(path) in str(refusal)
        assert "\n" not in str(refusal)
        assert refusal.exit_code == 3
    else:
        assert isinstance(loaded.module, Vim)
        assert all(bool(torch.isfinite(one).all()) for one in loaded.module.parameters())


@FUZZ
@given(st.sampled_from(FORMATS), st.floats(0, 1, exclude_max=True))
def test_truncated(folder: Path, format: str, share: float) -> None:
    whole = content(format, folder)
    load(whole[: int(share * len(whole))], folder)


@FUZZ
@given(
    st.sampled_from(FORMATS),
    st.lists(
        st.tuples(st.sampled_from(["start", "end", "any"]), st.integers(0, 10**9)), min_size=1
    ),
    st.integers(0, 7),
)
def test_flipped_bits(folder: Path, format: str, places: list[tuple[str, int]], bit: int) -> None:
    damaged = bytearray(content(format, folder))
    for where, offset in places:
        reach = {"start": range(0, 3000), "end": range(len(damaged) - 3000, len(damaged))}
        span = reach.get(where, range(len(damaged)))
        damaged[span[offset % len(span)]] ^= 1 << bit
    load(bytes(damaged), folder)


@FUZZ
@given(st.sampled_from(FORMATS), st.integers(0, 10**9), st.binary(min_size=1, max_size=40))
def test_overwritten(folder: Path, format: str, offset: int, junk: bytes) -> None:
    damaged = bytearray(content(format, folder))
    at = offset % min(len(damaged), 4000)
    damaged[at : at + len(junk)] = junk
    load(bytes(damaged), folder)


@pytest.mark.parametrize("format", FORMATS)
def test_the_whole_file_loads(folder: Path, format: str) -> None:
    path = folder / "whole.pth"
    path.write_bytes(content(format, folder))
    if format == "safetensors":  # it names an architecture of another width
        with pytest.raises(ModelError, match="vim_micro expects"):
            load_model(path)
        return
    assert isinstance(load_model(path).module, Vim)


def test_command_leaves_nothing_behind(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cut.pth").write_bytes(content("training", folder)[:5000])
    monkeypatch.setattr(sys, "argv", ["ouro-compile", "cut.pth", "--calibration", "noise"])
    with pytest.raises(SystemExit) as stop:
        compile_main()
    assert stop.value.code == 3
    assert capsys.readouterr().err.startswith("error: cannot open cut.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["cut.pth"]
