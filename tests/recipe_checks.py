"""What every simulated recipe has to keep: files, samples apart from each other, accuracy."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, fx

import ouro_compiler as ouro
from ouro_compiler.calibration.images import TensorImages
from ouro_compiler.config import QuantConfig
from ouro_compiler.evaluation import snr_db
from ouro_compiler.frontend.capture import capture
from ouro_compiler.frontend.checkpoint import load_model
from ouro_compiler.graph import Calibration
from ouro_compiler.models.vmamba import VMambaConfig
from ouro_compiler.passes import NORMALIZE
from ouro_compiler.passes.base import PassContext, run_passes
from ouro_compiler.recipes import find_recipe
from ouro_compiler.recipes.planning import Plan
from ouro_compiler.runtime.compiled_model import CompiledModel
from tests.models import images, small_vim

EXAMPLES = Path(__file__).parent.parent / "examples"


@lru_cache(maxsize=1)
def normalised_vim() -> fx.GraphModule:
    """small_vim as recipes get it; plans and calibration leave it as it is."""
    gm = capture(small_vim(), images(2))
    run_passes(gm, NORMALIZE, PassContext())
    return gm


def planned(config: QuantConfig) -> Plan:
    """What the recipe chooses of small_vim."""
    return find_recipe(config.recipe).plan(normalised_vim(), config)


def calibrated(config: QuantConfig, noise: Tensor | None = None) -> tuple[Plan, Calibration]:
    """What it finds on 8 noise images, or others."""
    plan = planned(config)
    some = TensorImages(images(8) if noise is None else noise)
    recipe = find_recipe(config.recipe)
    return plan, recipe.calibrate(normalised_vim(), plan, config, some, batch_size=5)


def compiled_vmamba(config: QuantConfig) -> CompiledModel:
    """One block of VMamba with random weights, on 16 pixels, compiled on noise."""
    torch.manual_seed(0)
    model = VMambaConfig(
        img_size=16, in_chans=1, embed_dim=32, depths=(1,), mlp_ratio=2.0, num_classes=10
    ).build()
    noise = torch.randn(12, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    return ouro.compile(model.eval().requires_grad_(False), noise[:2], config, calibration=noise)


def assert_survives_a_file(model: CompiledModel, folder: Path) -> None:
    """Saved and loaded again, the same logits to the last bit."""
    model.save(folder / "model.pt2")
    loaded = ouro.load(folder / "model.pt2")
    x = images(3, seed=5)
    assert torch.equal(loaded(x), model(x))
    assert loaded.report == model.report


def assert_batch_invariant_model(model: CompiledModel) -> None:
    """T5, T33: a sample's logits do not depend on loud company, or on its place in the batch.

    ATen's linears differ in the last bits between batch sizes, and may move a code by one.
    """
    batch = images(6, seed=2)
    whole = model(torch.cat([batch, 20 * images(6, seed=3)]))[:6]
    scale = whole.abs().max()
    for index in range(6):
        alone = model(batch[index : index + 1])[0]
        assert (alone - whole[index]).abs().max() <= 2e-2 * scale
    assert (model(batch.flip(0)).flip(0) - whole).abs().max() <= 2e-2 * scale
    # The bound means something: another sample's logits are far away.
    assert (whole - whole.roll(1, 0)).abs().max() > 10 * 2e-2 * scale


@lru_cache(maxsize=4)
def _arrays(name: str, count: int) -> tuple[Tensor, Tensor]:
    held = np.load(EXAMPLES / f"digits_{name}.npz")
    return torch.from_numpy(held["images"][:count]), torch.from_numpy(held["labels"][:count])


def digits(name: str, config: QuantConfig) -> tuple[CompiledModel, Tensor]:
    """The example model compiled on 16 real digits, and its own logits of 100 others."""
    loaded = load_model(EXAMPLES / f"{name}_digits.safetensors")
    compiled = ouro.compile(
        loaded.module, loaded.example, config, calibration=_arrays("calibration", 16)[0]
    )
    with torch.no_grad():
        return compiled, loaded.module(_arrays("test", 100)[0])


def assert_close_to_floating_point(found: tuple[CompiledModel, Tensor], *, snr_db: float) -> None:
    """On held-out digits: logits within so many decibels, and nearly all classes."""
    compiled, logits = found
    x, labels = _arrays("test", 100)
    made = compiled(x)
    assert _snr(logits, made) > snr_db
    assert int((made.argmax(1) == labels).sum()) >= 95


_snr = snr_db
