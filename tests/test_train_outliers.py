"""Training towards outliers that move: what the loss prefers, and that a run gets there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ouro_compiler.frontend.checkpoint import load_model
from scripts import train_outliers as script
from scripts.train_outliers import (
    outlier_loss,
    outlier_statistics,
    relative_sizes,
    watched_inputs,
)
from tests.models import images, small_vim, vim_micro

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_the_loss_wants_one_moving_outlier_a_token() -> None:
    made = torch.Generator().manual_seed(0)
    even = torch.randn(960, 48, generator=made)
    static, moving = 0.1 * even, 0.1 * even
    static[:, 3] += 5
    moving[torch.arange(960), torch.arange(960) % 48] += 5
    losses = [float(outlier_loss(x)) for x in (moving, even, static)]
    assert losses[0] < 1e-3
    assert losses[0] < losses[1] < losses[2]
    assert losses[2] > 0.99
    assert float(outlier_loss(torch.zeros(4, 48))) == pytest.approx(1)


def test_sizes_are_relative_to_a_token() -> None:
    x = torch.tensor([[3.0, -4.0], [0.03, 0.04]])
    expected = x.abs() / torch.tensor([[12.5], [0.00125]]).sqrt()
    torch.testing.assert_close(relative_sizes(x), expected, rtol=1e-3, atol=0)


def test_linears_of_mixers_are_watched() -> None:
    model = small_vim()
    with watched_inputs(model) as inputs:
        model(images(3))
    widths = [linear.in_features for layer in model.layers for linear in _ends(layer.mixer)]
    assert [x.shape[1] for x in inputs] == widths
    assert len({x.shape[0] for x in inputs}) == 1
    assert inputs[0].shape[0] % 3 == 0
    with watched_inputs(model) as again:
        pass
    model(images(1))
    assert again == []


def _ends(mixer: torch.nn.Module) -> list[torch.nn.Linear]:
    return [mixer.in_proj, mixer.out_proj]  # type: ignore[list-item]


def test_the_example_has_outliers_that_move() -> None:
    digits = np.load(EXAMPLES / "digits_test.npz")
    batch, labels = (torch.from_numpy(digits[name]) for name in ("images", "labels"))
    found = {}
    for name in ("vim_digits", "vim_outliers"):
        model = load_model(EXAMPLES / f"{name}.safetensors").module
        assert isinstance(model, torch.nn.Module)
        with torch.no_grad():
            assert float((model(batch[:500]).argmax(1) == labels[:500]).float().mean()) > 0.96
        found[name] = outlier_statistics(model, batch[:64])
    assert found["vim_outliers"][0] > 4.5
    assert found["vim_outliers"][1] < 0.2 < 0.45 < found["vim_digits"][1]


def test_a_short_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    start = vim_micro(depth=1).eval()
    state = {name: tensor.contiguous() for name, tensor in start.state_dict().items()}
    save_file(state, tmp_path / "in.safetensors")
    labels = torch.arange(64) % 10

    def digits(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return images(64, seed=seed), labels, images(64, seed=seed), labels

    monkeypatch.setattr(script, "load_digits", digits)
    monkeypatch.setattr(script, "BATCH", 8)
    paths = [str(tmp_path / name) for name in ("in.safetensors", "out.safetensors")]
    monkeypatch.setattr("sys.argv", ["train", *paths, "--steps", "60", "--weight", "3"])
    script.main()
    assert capsys.readouterr().out.count("accuracy") == 2
    trained = load_model(Path(paths[1]))
    losses = []
    for model in (start, trained.module):
        assert isinstance(model, torch.nn.Module)
        with watched_inputs(model) as inputs, torch.no_grad():
            model(images(16, seed=9))
        losses.append(sum(float(outlier_loss(x)) for x in inputs))
    assert losses[1] < losses[0]
    assert trained.name == load_model(Path(paths[0])).name
    assert not list(tmp_path.glob("*.partial"))
