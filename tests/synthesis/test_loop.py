"""Images are made: losses fall, and an image depends on its number alone (METHODS T27, T29)."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ouro_compiler.calibration.synthesis.loop import Synthesizer, default_iterations
from ouro_compiler.calibration.synthesis.objectives import (
    ClassificationLoss,
    DetectionLoss,
    SegmentationLoss,
    draw_variation,
    variation,
)
from ouro_compiler.compiler import prepare
from ouro_compiler.config import W4A4, Preprocessing, SynthesisSpec
from ouro_compiler.errors import UsageError
from ouro_compiler.frontend.capture import capture
from tests.helpers import generator
from tests.models import small_vim

PREPROCESSING = Preprocessing(size=28, mean=(0.1307,), std=(0.3081,))
SPEC = SynthesisSpec(images=4, iterations=6, batch_size=4)


@functools.lru_cache(maxsize=8)
def synthesizer(spec: SynthesisSpec = SPEC) -> Synthesizer:
    """For a micro Vim of one block."""
    gm = capture(small_vim(), torch.randn(2, 1, 28, 28))
    prepare(gm, W4A4)
    return Synthesizer(gm, PREPROCESSING, spec)


def made(spec: SynthesisSpec, numbers: list[int]) -> Tensor:
    """The images of these numbers, finished."""
    maker = synthesizer(spec)
    batch = maker.start(numbers)
    while batch.iteration < maker.iterations:
        maker.step(batch)
    return batch.images


def test_same_seed_same_images() -> None:
    assert torch.equal(made(SPEC, [0, 1]), made(SPEC, [0, 1]))
    other = made(replace(SPEC, seed=1), [0, 1])
    assert not torch.equal(made(SPEC, [0, 1]), other)


@pytest.mark.parametrize("features", ["yp", "alpha"])
def test_an_image_does_not_depend_on_the_others(features: str) -> None:
    maker = synthesizer(replace(SPEC, features=features, alpha_channels=4))
    together, alone = maker.start([3, 5, 7]), maker.start([5])
    assert torch.equal(together.images[1], alone.images[0])
    wanted = [maker.targets(number) for number in (3, 5, 7)]
    losses = maker.losses(together.images, wanted, [3, 5, 7], 0)
    own = maker.losses(alone.images, wanted[1:2], [5], 0)
    torch.testing.assert_close(losses[1:2], own, rtol=1e-5, atol=1e-6)
    for _ in range(2):
        maker.step(together)
        maker.step(alone)
    # Adam divides by the root of the gradient's square: its sign can hang on the last bit.
    close = torch.isclose(together.images[1], alone.images[0], atol=1e-3)
    assert float(close.float().mean()) > 0.99


@pytest.mark.parametrize("features", ["yp", "alpha"])
def test_losses_fall_and_classes_rise(features: str) -> None:
    spec = replace(
        SPEC,
        features=features,
        alpha_channels=4,
        iterations=50,
        variation_weight=0.28,
        jitter=0.0,
        flip=False,
    )
    maker = synthesizer(spec)
    numbers = [0, 1, 2, 3]
    batch = maker.start(numbers)
    targets = [maker.targets(number) for number in numbers]
    with torch.no_grad():
        before = maker.losses(batch.images, targets, numbers, 0).mean(0)
    while batch.iteration < maker.iterations:
        maker.step(batch)
    with torch.no_grad():
        after = maker.losses(batch.images, targets, numbers, 0).mean(0)
    assert bool((after < before).all()), (before, after)
    assert len(batch.curve) == 50


@pytest.mark.parametrize("features", ["yp", "alpha"])
def test_gradients_of_the_contrastive_loss_reach_the_image(features: str) -> None:
    maker = synthesizer(replace(SPEC, features=features))
    images = maker.start([0]).images.requires_grad_()
    maker.run(images, generator(0))[1].sum().backward()
    assert images.grad is not None
    assert bool(torch.isfinite(images.grad).all())
    assert float(images.grad.abs().max()) > 0


def test_pixels_stay_valid() -> None:
    images = made(replace(SPEC, learning_rate=5.0), [0, 1])
    pixels = images * 0.3081 + 0.1307
    assert float(pixels.min()) >= -1e-6
    assert float(pixels.max()) <= 1 + 1e-6


def test_the_rate_warms_up_and_falls_in_two_rounds() -> None:
    maker = synthesizer(replace(SPEC, iterations=40))
    rates = [maker.rate(iteration) for iteration in range(40)]
    assert rates[:4] == pytest.approx([0.05, 0.1, 0.15, 0.2])
    assert rates[19] < 0.01
    assert rates[20:24] == pytest.approx([0.05, 0.1, 0.15, 0.2])


def test_models_without_a_map_or_logits_are_refused() -> None:
    class Flat(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean((2, 3)).view(-1, 1, 1)

    gm = capture(Flat(), torch.randn(2, 1, 28, 28))
    with pytest.raises(UsageError, match="cannot be synthesised from this model"):
        Synthesizer(gm, PREPROCESSING, SPEC)


def test_models_without_a_task_are_made_for_their_features() -> None:
    maker = synthesizer(replace(SPEC, output_loss="none"))
    batch = maker.start([0])
    maker.step(batch)
    assert batch.curve[0][2] == 0
    assert batch.curve[0][1] > 0


def test_output_losses_of_other_tasks() -> None:
    segmentation = SegmentationLoss(5, (32, 32), "ce")
    maps = [segmentation.draw(generator(seed)) for seed in range(3)]
    assert maps[0]["labels"].shape == (32, 32)
    changes = (maps[0]["labels"][:, 1:] != maps[0]["labels"][:, :-1]).float().mean()
    assert float(changes) < 0.3  # smooth: neighbours mostly agree
    outputs = torch.randn(3, 5, 8, 8, generator=generator(9), requires_grad=True)
    loss = segmentation(outputs, maps)
    assert loss.shape == (3,)
    loss[0].backward()
    assert outputs.grad is not None
    assert float(outputs.grad[1:].abs().max()) == 0  # of its own image alone
    detection = DetectionLoss(7, 64, lambda outputs, targets: torch.ones(len(targets)))
    target = detection.draw(generator(1))
    assert target["boxes"].shape == (len(target["labels"]), 4)
    assert bool((target["boxes"][:, 2:] > target["boxes"][:, :2]).all())
    assert float(target["boxes"].max()) <= 64
    assert detection(None, [target, target]).tolist() == [1, 1]


def test_mae_counts_classes() -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 0.0, 0.0]])
    loss = ClassificationLoss(3, "mae")
    targets = [{"label": torch.tensor(0)}, {"label": torch.tensor(2)}]
    wanted = torch.eye(3)[[0, 2]]
    expected = 3 * (logits.softmax(1) - wanted).abs().mean(1)
    torch.testing.assert_close(loss(logits, targets), expected)


def test_variation_is_that_of_smooth_images_scaled_by_size() -> None:
    flat = torch.zeros(1, 1, 28, 28)
    ramp = torch.arange(28.0).expand(1, 1, 28, 28)
    assert float(variation(flat)) == 0
    # Rows do not change: columns by 1, both diagonals by 1.
    assert float(variation(ramp)) == pytest.approx((28 * 27) ** 0.5 + 2 * 27)
    assert 442 <= float(draw_variation((3, 224, 224), generator(0))) <= 530
    assert float(draw_variation((3, 112, 112), generator(0))) < 270


def test_small_images_may_vary_as_they_like() -> None:
    assert synthesizer().spec.variation_weight == 0
    assert synthesizer(replace(SPEC, variation_weight=0.5)).spec.variation_weight == 0.5


def test_a_cpu_has_fewer_iterations_than_a_gpu() -> None:
    assert default_iterations(224, torch.device("cuda")) == 1000
    assert default_iterations(28, torch.device("cpu")) > default_iterations(
        224, torch.device("cpu")
    )
