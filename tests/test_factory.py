"""Models by `package.module:function`: arguments, weights, shapes, a sentence for the rest."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import ouro_compiler as ouro
from ouro_compiler.cli import compile_main
from ouro_compiler.errors import ModelError, UsageError
from ouro_compiler.frontend.factory import is_factory, load_factory
from ouro_compiler.models.vim import Vim, vim_micro

MODULE = """
import torch
from torch import nn
from ouro_compiler.models.vim import vim_micro

def small(depth=1, classes=10, norm="rms"):
    torch.manual_seed(0)
    return vim_micro(depth=depth, num_classes=classes, norm=norm)

class Holder:
    @staticmethod
    def build():
        return nn.Sequential(nn.Flatten(), nn.Linear(48, 4))

def fails():
    raise RuntimeError("no such size\\nand more")

def number():
    return 3

def infinite():
    model = nn.Linear(2, 2)
    model.weight.data[0, 0] = float("inf")
    return model
"""


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "my_models.py").write_text(MODULE)
    (tmp_path / "broken_models.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("my_models", None)


def test_what_a_factory_looks_like() -> None:
    assert is_factory("my_models:small")
    assert is_factory("a.b.c:D.build")
    for other in ("vim.pth", "my_models", ":small", "my_models:", "a b:c", "dir/vim:x", "a:b:c"):
        assert not is_factory(other)
    Path("my_models:small").write_text("")
    assert not is_factory("my_models:small"), "a file of that name is a file"


def test_arguments_are_literals_or_strings() -> None:
    loaded = load_factory("my_models:small", arguments=["depth=2", "classes=7", "norm=layer"])
    assert isinstance(loaded.module, Vim)
    assert (loaded.module.config.depth, loaded.module.config.norm) == (2, "layer")
    assert loaded.name == "small"
    assert loaded.example.shape == (2, 1, 28, 28), "from the module's own configuration"
    assert not loaded.module.training
    assert not any(parameter.requires_grad for parameter in loaded.module.parameters())


def test_input_shape() -> None:
    loaded = load_factory("my_models:Holder.build", input_shape="3x4x4")
    assert loaded.example.shape == (2, 3, 4, 4)
    assert loaded.preprocessing.size == 4


@pytest.mark.parametrize("format", ["safetensors", "pth"])
def test_weights(format: str, tmp_path: Path) -> None:
    torch.manual_seed(5)
    other = vim_micro(depth=1).eval()
    path = tmp_path / f"w.{format}"
    if format == "pth":
        torch.save({"model": other.state_dict()}, path)
    else:
        save_file(other.state_dict(), path)
    loaded = load_factory("my_models:small", checkpoint=path)
    assert isinstance(loaded.module, nn.Module)
    x = torch.randn(2, 1, 28, 28)
    assert torch.equal(loaded.module(x), other(x))


@pytest.mark.parametrize(
    ("source", "options", "error", "words"),
    [
        ("not_a_module:small", {}, UsageError, "cannot import not_a_module"),
        ("broken_models:small", {}, UsageError, "a_package_that_is_not_there"),
        ("my_models:large", {}, UsageError, "my_models has no function large"),
        ("my_models:nn.Linear.missing", {}, UsageError, "has no function"),
        ("my_models:small", {"arguments": ["depth"]}, UsageError, "takes name=value, got 'depth'"),
        ("my_models:small", {"arguments": ["width=3"]}, ModelError, "failed (TypeError: small()"),
        ("my_models:fails", {}, ModelError, "failed (RuntimeError: no such size)"),
        ("my_models:number", {}, ModelError, "gave a int, not an nn.Module"),
        ("my_models:infinite", {}, ModelError, "weight holds NaN or infinite"),
        ("my_models:small", {"input_shape": "28"}, UsageError, "takes CxHxW"),
        ("my_models:small", {"input_shape": "3x28x14"}, UsageError, "must be square"),
        ("my_models:small", {"checkpoint": Path("none.pth")}, ModelError, "does not exist"),
    ],
)
def test_refusals(
    source: str, options: dict[str, object], error: type[Exception], words: str
) -> None:
    with pytest.raises(error) as caught:
        load_factory(source, **options)  # type: ignore[arg-type]
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"head.weight": torch.ones(10, 48)}, path)
    with pytest.raises(ModelError, match=r"cannot load .*the model needs tensors that are missing"):
        load_factory("my_models:small", checkpoint=path)


def test_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    images = torch.randn(6, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    np.savez(tmp_path / "images.npz", images=images.numpy())

    def run(*args: str) -> int:
        monkeypatch.setattr(sys, "argv", ["ouro-compile", *args, "--calibration", "images.npz"])
        try:
            compile_main()
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    assert run("my_models:small", "--model-arg", "depth=1", "--model-arg", "classes=3") == 0
    assert ouro.load("small.w4a4.pt2")(images).shape == (6, 3)
    assert run("my_models:small", "--arch", "vim_tiny") == 2
    assert "--arch and --ema are for checkpoints" in capsys.readouterr().err
    assert run("vim.pth", "--model-arg", "depth=1") == 2
    assert "vim.pth is a file" in capsys.readouterr().err
