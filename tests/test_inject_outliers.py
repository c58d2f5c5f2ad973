"""Outliers injected into models: the same function, other activations."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ouro_compiler.frontend.checkpoint import load_model
from ouro_compiler.frontend.detect import ARCHITECTURES
from scripts import inject_outliers as script
from scripts.inject_outliers import inject_outliers, largest_difference, norms_and_linears
from tests.models import images

FAMILIES = ("vim", "vmamba", "mambavision", "vit")


def micro(family: str) -> nn.Module:
    torch.manual_seed(0)
    model = ARCHITECTURES[f"{family}_micro"].build().eval().requires_grad_(False)
    for name, parameter in model.named_parameters():  # norms as training leaves them
        if "norm" in name:
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def inputs_of_linears(model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, inputs: found.__setitem__(name, inputs[0].flatten(0, -2))

    handles = [
        linear.register_forward_pre_hook(keep(name)) for name, _, linear in norms_and_linears(model)
    ]
    model(batch)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["even", "uneven"])
def test_the_function_stays_and_outliers_come(family: str, kind: str) -> None:
    model, batch = micro(family), images(8)
    made = inject_outliers(model, batch, kind=kind, channels=3, factor=20.0)
    assert largest_difference(model, made, images(8, seed=1)) < 1e-5
    before, after = inputs_of_linears(model, batch), inputs_of_linears(made, batch)
    assert len(before) >= 4
    for name, x in before.items():
        ratio = after[name].abs().amax(0) / x.abs().amax(0)
        assert int((ratio > 15).sum()) == 3, name
        assert int(((ratio > 0.9) & (ratio < 1.1)).sum()) == x.shape[1] - 3, name


def test_uneven_channels_vary_more_over_tokens() -> None:
    model, batch = micro("vim"), images(8)
    spread = {}
    for kind in ("even", "uneven"):
        made = inject_outliers(model, batch, kind=kind, channels=2, factor=50.0)
        found = inputs_of_linears(made, batch)["layers.0.norm"].abs()
        top = found.amax(0).topk(2).indices
        spread[kind] = float((found[:, top].quantile(0.98, 0) / found[:, top].mean(0)).mean())
    assert spread["uneven"] > spread["even"]


def test_refusals() -> None:
    batch = images(2)
    with pytest.raises(ValueError, match="no norm with a linear"):
        inject_outliers(nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), batch, kind="even")
    with pytest.raises(ValueError, match="channels, 99 were asked for"):
        inject_outliers(micro("vit"), batch, kind="even", channels=99)
    for wrong in ({"kind": "odd"}, {"kind": "even", "channels": 0}, {"kind": "even", "factor": 0}):
        with pytest.raises(ValueError, match="kind is one of"):
            inject_outliers(micro("vit"), batch, **wrong)  # type: ignore[arg-type]


def test_the_script_writes_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = micro("vit")
    save_file(model.state_dict(), "in.safetensors", metadata={"architecture": "vit_micro"})
    np.savez("images.npz", images=images(4).numpy())
    args = ["inject_outliers", "in.safetensors", "out.safetensors", "--images", "images.npz"]
    monkeypatch.setattr(sys, "argv", [*args, "--factor", "8"])
    script.main()
    assert "largest difference of the logits" in capsys.readouterr().out
    loaded = load_model(Path("out.safetensors"))
    assert loaded.name == "vit_micro"
    assert isinstance(loaded.module, nn.Module)
    assert largest_difference(model, loaded.module, images(4)) < 1e-5
    weight = model.state_dict()["blocks.0.norm1.weight"]
    ratio = loaded.module.state_dict()["blocks.0.norm1.weight"] / weight
    assert sorted(ratio.tolist())[-4:] == pytest.approx([8.0] * 4)
    monkeypatch.setattr(sys, "argv", [*args, "--factor", "1e39"])  # infinite in fp32
    Path("out.safetensors").unlink()
    with pytest.raises(SystemExit):
        script.main()
    assert not Path("out.safetensors").exists()
