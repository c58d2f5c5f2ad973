"""Running on a CPU: folded constants, direct calls and tapes give the graph's bits."""

from __future__ import annotations

import copy
import dataclasses
import threading
from functools import lru_cache

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import ouro_compiler as ouro
from ouro_compiler.kernels.cpp import launch as cpp_launch
from ouro_compiler.kernels.dispatch import ReferenceWarning
from ouro_compiler.kernels.launch import Launch
from ouro_compiler.runtime.compiled_model import CompiledModel
from ouro_compiler.runtime.cpu_runner import CpuRunner
from ouro_compiler.runtime.folding import fold_constants, unflatten
from ouro_compiler.runtime.tape import Tape, _Buffer, _place
from tests.models import images, small_vim


@lru_cache
def compiled(preset: str) -> CompiledModel:
    return ouro.compile(small_vim(), images(2), ouro.config.PRESETS[preset], calibration=images())


def by_graph(model: CompiledModel, batch: Tensor) -> Tensor:
    with torch.no_grad():
        return model.graph_module(batch)


@pytest.mark.parametrize("preset", ["w4a4", "w4a8", "w8a8"])
def test_the_same_bits_as_the_graph(preset: str) -> None:
    """Sizes in turn, so that graphs, tapes and dropped tapes all run."""
    model = compiled(preset)
    runner = CpuRunner(model.graph_module)
    for round_ in range(3):
        for size in (1, 3, 2, 1, 5):
            batch = images(size, seed=10 * round_ + size)
            assert torch.equal(runner(batch), by_graph(model, batch)), (round_, size)
    assert len(runner._tapes) == 2


def test_fixed_lists_are_on_the_tape() -> None:
    """Lists of outliers are written on every run, into memory that others used meanwhile."""
    activations = dataclasses.replace(ouro.W4A4.activations, outliers="static")
    config = dataclasses.replace(ouro.W4A4, activations=activations)
    model = ouro.compile(small_vim(), images(2), config, calibration=images())
    assert model.report["outlier_share"] > 0
    for seed in range(4):
        batch = images(3, seed=seed)
        assert torch.equal(model(batch), by_graph(model, batch)), seed


def test_a_tape_made_before_its_kernels_were_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their self-tests run on real tensors, although the tape records on fake ones."""
    model = compiled("w4a4")
    folded = fold_constants(model.graph_module)
    monkeypatch.setattr(cpp_launch, "_functions", {})
    batch = images(2, seed=7)
    with torch.no_grad():
        assert torch.equal(Tape(folded, batch)(batch), by_graph(model, batch))


def test_outputs_are_the_callers_own() -> None:
    """They stay as they are when the model runs again, and may be used under autograd."""
    model = compiled("w4a4")
    found = [model(images(2, seed=seed)) for seed in range(3)]
    for seed, one in enumerate(found):
        assert torch.equal(one, by_graph(model, images(2, seed=seed)))
        assert not one.is_inference()
    weight = torch.ones(found[0].shape[1], requires_grad=True)
    (found[2] * weight).sum().backward()
    assert torch.equal(weight.grad, found[2].sum(0))


def test_a_tape_calls_kernels_for_all_ops_of_ours() -> None:
    gm = fold_constants(compiled("w4a4").graph_module)
    tape = Tape(gm, images(2))
    assert not any("ouro" in str(one.function) for one in calls(tape))
    ours = [node for node in gm.graph.nodes if str(node.target).startswith("ouro.")]
    assert sum(isinstance(step, Launch) for step in tape._record.steps) == len(ours) > 20
    assert len(calls(tape)) <= 6, "patch embedding and head"


def calls(tape: Tape) -> list:  # type: ignore[type-arg]
    return [step for step in tape._record.steps if not isinstance(step, Launch)]


def test_memory_is_used_again() -> None:
    """Two tensors of one step never overlap, and all of them together take little."""
    tape = Tape(fold_constants(compiled("w4a4").graph_module), images(4))
    buffers = list(tape._buffers.values())
    for one in buffers:
        for other in buffers:
            if one is not other and one.first <= other.last and other.first <= one.last:
                assert one.offset + one.size <= other.offset or (
                    other.offset + other.size <= one.offset
                )
    assert tape.bytes < sum(one.size for one in buffers) / 2


def test_places() -> None:
    """First fit: the third takes the place of the first, which nobody reads by then."""
    buffers = [_Buffer(100, 0, 1), _Buffer(100, 1, 3), _Buffer(100, 2, 3), _Buffer(0, 0, 9)]
    assert _place(buffers) == 228
    assert [one.offset for one in buffers[:3]] == [0, 128, 0]


def test_threads_of_the_caller() -> None:
    """Several at once get their own results; the number of threads changes none."""
    model = compiled("w4a4")
    batches = [images(2, seed=seed) for seed in range(8)]
    expected = [by_graph(model, batch) for batch in batches]
    found: dict[int, Tensor] = {}

    def work(index: int) -> None:
        torch.set_num_threads(1 + index % 2)
        found[index] = model(batches[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[index], one) for index, one in enumerate(expected))


def test_without_a_compiler_references_run_on_the_tape(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the reason as a warning, and outputs that are close: sums are rounded otherwise."""
    model = compiled("w8a8")
    expected = by_graph(model, images(2, seed=1))
    monkeypatch.setattr(cpp_launch, "find_toolchain", lambda: None)
    runner = CpuRunner(model.graph_module)
    for _ in range(3):
        with pytest.warns(ReferenceWarning, match="no C.. compiler"):
            found = runner(images(2, seed=1))
        assert (found - expected).norm() < 0.02 * expected.norm()


def test_views_and_other_ops_on_a_tape() -> None:
    """Slices, permutations, copies, several outputs and one that is the input itself."""

    class Views(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            a, b = x.transpose(1, 2).chunk(2, dim=1)
            c = torch.cat([b, a], 1).reshape(x.shape[0], -1) * 2
            return c[:, 1:], a + 1, x

    gm = fx.symbolic_trace(Views())
    for size in (1, 3):
        tape = Tape(gm, torch.zeros(size, 5, 4))
        for seed in range(2):
            x = torch.randn(size, 5, 4, generator=torch.Generator().manual_seed(seed))
            for found, expected in zip(tape(x), Views()(x), strict=True):
                assert torch.equal(found, expected)


def test_a_copy_runs_on_its_own() -> None:
    model = compiled("w4a4")
    batch = images(2, seed=4)
    expected = [model(batch), model(batch)][1]
    assert torch.equal(copy.deepcopy(model)(batch), expected)


def test_images_of_another_dtype_are_refused() -> None:
    with pytest.raises(ouro.errors.UsageError, match=r"images are torch\.float64: pass them as"):
        compiled("w4a4")(images(2).double())


def test_constants_are_computed_once() -> None:
    gm = compiled("w4a4").graph_module
    folded = fold_constants(gm)
    names = {str(node.target) for node in gm.graph.nodes}
    assert "ouro.dequantize_weight.default" in names
    assert "ouro.dequantize_weight.default" not in {str(n.target) for n in folded.graph.nodes}
    packed = [t for t in folded.state_dict().values() if t.dtype == torch.uint8]
    assert packed, "codes of linear layers stay packed"
    assert len(gm.graph.nodes) > len(folded.graph.nodes)
    assert torch.equal(folded(images(2)), by_graph(compiled("w4a4"), images(2)))


@pytest.mark.parametrize("batch", [1, 3])
def test_unflatten_has_the_strides_of_fake_tensors(batch: int) -> None:
    """A convolution behind it then sums in the same order on the tape and off it."""
    for x in (torch.randn(batch, 12, 48), torch.randn(batch, 48, 12).transpose(1, 2)):
        for dim, sizes in ((1, [3, 4]), (-1, [6, -1]), (2, [2, 3, 8])):
            found = unflatten(x, dim, sizes)
            assert torch.equal(found, x.unflatten(dim, sizes))
            assert found.data_ptr() == x.data_ptr()
            with FakeTensorMode() as mode:
                expected = mode.from_tensor(x).unflatten(dim, sizes)
            assert found.stride() == expected.stride()
