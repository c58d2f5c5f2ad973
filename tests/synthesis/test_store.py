"""Synthesised images on disk: resumed bit for bit, found again, and made again when damaged."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from ouro_compiler.calibration.synthesis import synthesize as module
from ouro_compiler.calibration.synthesis.loop import Batch, Synthesizer
from ouro_compiler.calibration.synthesis.synthesize import Synthesized, spoken, synthesize
from ouro_compiler.compiler import prepare
from ouro_compiler.config import W4A4, Preprocessing, SynthesisSpec
from ouro_compiler.errors import UsageError
from ouro_compiler.frontend.capture import capture
from tests.models import images, small_vim

GREY = Preprocessing(size=28, mean=(0.5,), std=(0.5,))
SPEC = SynthesisSpec(images=3, iterations=3, batch_size=2)


@pytest.fixture(scope="module")
def graph() -> fx.GraphModule:
    gm = capture(small_vim(), images(2))
    prepare(gm, W4A4)
    return gm


class Counting(Synthesizer):
    """A synthesizer that counts its steps."""

    taken = 0

    def step(self, batch: Batch) -> None:
        self.taken += 1
        super().step(batch)


def maker(graph: fx.GraphModule, **changes: Any) -> Counting:
    return Counting(graph, GREY, dataclasses.replace(SPEC, **changes))


@pytest.fixture(scope="module")
def plain(graph: fx.GraphModule) -> Synthesized:
    """What a run without a cache gives."""
    return synthesize(maker(graph))


def interrupt_after(steps: int) -> Callable[[str, int, int], None]:
    def progress(stage: str, done: int, total: int) -> None:
        assert total == 6
        if done == steps:
            raise KeyboardInterrupt

    return progress


def same(one: Synthesized, other: Synthesized) -> None:
    assert torch.equal(one.images, other.images)
    assert torch.equal(one.curve, other.curve)


def test_images_of_a_run(plain: Synthesized) -> None:
    assert plain.images.shape == (3, 1, 28, 28)
    assert plain.labels is None
    assert plain.description == "3 synthetic images"
    assert plain.target_labels is not None
    assert plain.target_labels.dtype == torch.int64
    assert plain.curve.shape == (3, 4)
    assert [len(batch) for batch in plain.batches(2)] == [2, 1]
    assert len(plain) == 3


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 6])
def test_an_interrupted_run_goes_on_with_the_same_bits(
    graph: fx.GraphModule, plain: Synthesized, tmp_path: Path, steps: int
) -> None:
    with pytest.raises(KeyboardInterrupt):
        synthesize(maker(graph), folder=tmp_path, progress=interrupt_after(steps))
    second = maker(graph)
    same(synthesize(second, folder=tmp_path), plain)
    assert second.taken == 6 - steps
    assert not list(tmp_path.rglob("*.partial"))


def test_a_step_that_is_cut_short_is_taken_again(
    graph: fx.GraphModule, plain: Synthesized, tmp_path: Path
) -> None:
    class Cut(Synthesizer):
        def step(self, batch: Batch) -> None:
            super().step(batch)
            if batch.iteration == 2:
                batch.images.zero_()  # in the middle of something
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesize(Cut(graph, GREY, SPEC), folder=tmp_path)
    second = maker(graph)
    same(synthesize(second, folder=tmp_path), plain)
    assert second.taken == 5


def test_unfinished_batches_are_kept_from_time_to_time(
    graph: fx.GraphModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_INTERVAL", -1.0)
    seen = []

    def progress(stage: str, done: int, total: int) -> None:
        seen.append((stage, len(list(tmp_path.rglob("*.safetensors")))))

    synthesize(maker(graph), folder=tmp_path, progress=progress)
    assert [files for _, files in seen] == [0, 1, 1, 1, 2, 2]
    assert all(stage.startswith("synthesising images: loss ") for stage, _ in seen)


def test_a_second_run_takes_no_step(
    graph: fx.GraphModule, plain: Synthesized, tmp_path: Path
) -> None:
    synthesize(maker(graph), folder=tmp_path)
    seen: list[Any] = []
    second = maker(graph)
    found = synthesize(second, folder=tmp_path, progress=lambda *told: seen.append(told))
    same(found, plain)
    assert (second.taken, seen) == (0, [])
    assert len(list(tmp_path.iterdir())) == 1


def test_other_models_and_settings_have_their_own_images(
    graph: fx.GraphModule, tmp_path: Path
) -> None:
    other = capture(small_vim(), images(2))
    prepare(other, W4A4)
    synthesize(maker(other), folder=tmp_path)
    found = maker(graph)
    synthesize(found, folder=tmp_path)
    assert found.taken == 0, "the same model, captured twice"
    name = next(n.target for n in other.graph.nodes if n.op == "get_attr" and n.target[-1] == "t")
    with torch.no_grad():
        changed = other.get_parameter(name).clone()
        changed.view(-1)[0] += 1e-3
        owner, _, leaf = name.rpartition(".")
        setattr(other.get_submodule(owner), leaf, torch.nn.Parameter(changed))
    for count, one in enumerate(
        (maker(other), maker(graph, seed=1), maker(graph, jitter=1.0), maker(graph, images=2)), 2
    ):
        synthesize(one, folder=tmp_path)
        assert one.taken > 0
        assert len(list(tmp_path.iterdir())) == count


@pytest.mark.parametrize("damage", ["bytes", "short", "text", "swapped", "foreign"])
def test_a_damaged_file_is_made_again(
    graph: fx.GraphModule,
    plain: Synthesized,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    damage: str,
) -> None:
    synthesize(maker(graph), folder=tmp_path)
    first, last = sorted(tmp_path.rglob("*.safetensors"))
    content = bytearray(first.read_bytes())
    if damage == "bytes":
        content[-5] ^= 1
    elif damage == "short":
        del content[len(content) // 2 :]
    elif damage == "text":
        content = bytearray(b"not images")
    elif damage == "swapped":
        content = bytearray(last.read_bytes())
    else:
        synthesize(maker(graph, seed=1), folder=tmp_path / "other")
        content = bytearray(sorted((tmp_path / "other").rglob("*.safetensors"))[0].read_bytes())
    first.write_bytes(content)
    second = maker(graph)
    with caplog.at_level(logging.WARNING):
        same(synthesize(second, folder=tmp_path), plain)
    assert second.taken == 3
    assert "made again" in caplog.text


def test_a_full_disk_stops_nothing(
    graph: fx.GraphModule, plain: Synthesized, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = tmp_path / "file"
    place.write_text("no folder")
    same(synthesize(maker(graph), folder=place), plain)
    assert "are not kept" in caplog.text


def test_a_loss_that_cannot_be_told_from_others_keeps_nothing(
    graph: fx.GraphModule, tmp_path: Path
) -> None:
    class Loss:
        def __init__(self) -> None:
            self.function = torch.square

        def draw(self, generator: torch.Generator) -> dict[str, Tensor]:
            return {}

        def __call__(self, outputs: Any, targets: list[dict[str, Tensor]]) -> Tensor:
            return self.function(outputs).sum(1)

    found = synthesize(Synthesizer(graph, GREY, SPEC, output_loss=Loss()), folder=tmp_path)
    assert found.target_labels is None
    assert not list(tmp_path.iterdir())


def test_images_that_are_not_finite_are_refused(graph: fx.GraphModule, tmp_path: Path) -> None:
    class Diverging(Synthesizer):
        def step(self, batch: Batch) -> None:
            super().step(batch)
            batch.images[0, 0, 0, 0] = float("nan")

    with pytest.raises(UsageError, match="not finite"):
        synthesize(Diverging(graph, GREY, SPEC), folder=tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_the_time_is_said_once(graph: fx.GraphModule, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger=module.estimates.name):
        synthesize(maker(graph, iterations=4))
    assert [r.getMessage() for r in caplog.records] == [
        "synthesising 3 images in 4 iterations: about 1 s"
    ]
    assert [spoken(s) for s in (0.2, 59, 100, 3661)] == ["1 s", "59 s", "1 min 40 s", "1 h 1 min"]
