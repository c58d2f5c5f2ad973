"""Tuning: every candidate gives the default's bits; the whole search; what is refused and kept."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

import ouro_compiler as ouro
from ouro_compiler.cli.tune import TuneRequest, run
from ouro_compiler.kernels.candidates import (
    Choice,
    as_choice,
    candidates,
    current_choice,
    is_candidate,
    value_of,
)
from ouro_compiler.kernels.launch import Launch, record_launches, start
from ouro_compiler.kernels.linear import linear_dynamic_outlier
from ouro_compiler.kernels.quantize import (
    causal_conv1d_quantize,
    dequantize_dynamic_outlier,
    gate_sum_quantize,
    quantize_dynamic_outlier,
)
from ouro_compiler.kernels.scan import causal_conv1d
from ouro_compiler.kernels.spec import KernelSpec
from ouro_compiler.kernels.tuned import defaults_only, forget, key_of, machine_of
from ouro_compiler.kernels.tuning_table import keep_rows, read_table
from ouro_compiler.models.vim import vim_micro
from ouro_compiler.ops.quantize import quantize_dynamic_outlier_ref
from ouro_compiler.runtime import tuning_trials
from ouro_compiler.runtime.compiled_model import CompiledModel
from ouro_compiler.runtime.folding import fold_constants
from ouro_compiler.runtime.schedule import Schedule
from ouro_compiler.runtime.tune import tune
from ouro_compiler.runtime.tuning_search import Search
from ouro_compiler.runtime.tuning_tasks import Task, find_tasks, schedule_of
from ouro_compiler.runtime.tuning_trials import (
    NO_ROOM,
    OTHER_BITS,
    SPILLS,
    RefusedError,
    Trials,
    host_timer,
)
from tests.helpers import generator, randn
from tests.kernels.inputs import activation, on

pytestmark = pytest.mark.usefixtures("poisoned")
STATIC = (4, 8, 4, False)


@pytest.fixture
def own_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache without tuned kernels; other tests see none of ours."""
    tiny_model()  # compiled before, with the cache that is there
    monkeypatch.setenv("OURO_CACHE_DIR", str(tmp_path / "ouro"))
    forget()
    yield
    monkeypatch.undo()
    forget()


@functools.cache
def tiny_model() -> CompiledModel:
    """A Vim of one layer on five tokens, compiled."""
    torch.manual_seed(3)
    model = vim_micro(depth=1, img_size=8, patch_size=4, embed_dim=32, d_state=4).eval()
    x = torch.randn(4, 1, 8, 8, generator=generator(1))
    return ouro.compile(model.requires_grad_(False), x[:1], ouro.W4A4, calibration=x)


def recorded(call: Callable[[], Any]) -> Launch:
    with defaults_only(), record_launches() as recording:
        call()
    (launch,) = recording.launches
    return launch


def multiplied(device: str, outlier_bits: int, late: bool = False) -> Launch:
    """A product over 70 columns in two samples of 33 tokens; late: outliers come in the middle."""
    x, scale, threshold = activation(5, (2, 33, 70), 2)
    if late:
        x[:, 18:, ::2] *= 40
    ints = (4, outlier_bits, 4, False)
    codes, outlier_scale, start = quantize_dynamic_outlier_ref(x, scale, None, threshold, *ints)
    weight = torch.randint(-7, 8, (40, 70), generator=generator(1)).to(torch.int8)
    args = (codes, scale, outlier_scale, start, x if outlier_bits == 16 else None, weight)
    vectors = (torch.rand(40, generator=generator(2)), randn(8, 40))
    given = on(device, *args, *vectors)
    return recorded(lambda: linear_dynamic_outlier(*given, None, "none", *ints))


def launches(device: str) -> dict[str, Callable[[], Launch]]:
    x, scale, threshold = on(device, *activation(3, (2, 5, 70), 1))
    ref = quantize_dynamic_outlier_ref(x.cpu(), scale.cpu(), None, threshold.cpu(), *STATIC)
    codes, outlier_scale, start = on(device, *ref)
    weight, bias = on(device, randn(1, 70, 4), randn(2, 70))
    tokens, vectors = x.transpose(1, 2), (scale, threshold)
    return {
        "dequantize": lambda: recorded(
            lambda: dequantize_dynamic_outlier(
                codes, scale, None, outlier_scale, start, None, *STATIC
            )
        ),
        "conv": lambda: recorded(lambda: causal_conv1d(tokens, weight, bias, True)),
        "quantize": lambda: recorded(
            lambda: quantize_dynamic_outlier(x, scale, None, threshold, *STATIC)
        ),
        "conv_quantize": lambda: recorded(
            lambda: causal_conv1d_quantize(tokens, weight, bias, True, *vectors, *STATIC)
        ),
        "gate_sum_quantize": lambda: recorded(
            lambda: gate_sum_quantize(tokens, tokens, tokens, 0.5, *vectors, *STATIC, True)
        ),
        "product": lambda: multiplied(device, 8),
        "product with fp outliers": lambda: multiplied(device, 16),
    }


NAMES = (
    *("dequantize", "conv", "quantize", "conv_quantize", "gate_sum_quantize"),
    *("product", "product with fp outliers"),
)


def instant(found: Sequence[Launch]) -> Callable[[], float]:
    """A timer for which everything takes as long."""
    return lambda: float(len(found))


@pytest.mark.parametrize("name", NAMES)
def test_candidates_give_the_defaults_bits(name: str, device: str) -> None:
    """Values of every free name, one candidate each at least."""
    launch = launches(device)[name]()
    trials = Trials([launch], instant, 1)
    default = dict(current_choice(launch.spec))
    seen: set[tuple[str, int]] = set()
    for choice in candidates(launch.spec, current_choice(launch.spec), 66):
        if seen.issuperset(choice):
            continue
        seen.update(choice)
        assert trials.ratio(choice) == 1.0, choice
    assert {one for one, value in seen if value != default[one]} == default.keys()


@pytest.mark.usefixtures("own_table")
@pytest.mark.parametrize("wrong", [{"BLOCK_M": 16}, {"BLOCK_N": 16}])
def test_a_candidate_that_changes_a_sum_is_refused_and_noted(
    wrong: dict[str, int], device: str
) -> None:
    """Tiles of other rows list other columns: what is added up together is not the same.

    Tiles of other columns are multiplied otherwise, by the interpreter at least.
    """
    if device == "cuda" and "BLOCK_N" in wrong:
        pytest.skip("a matrix instruction for other columns may well add up in the same order")
    launch = multiplied(device, 16, late=True)
    key = key_of(launch.spec, launch.args)
    task = Task(steps=(0,), launches=(launch,), members={key: launch}, work=1.0)
    search = Search(task, trials=Trials([launch], instant, 1))
    offered = as_choice(wrong)
    assert not is_candidate(launch.spec, offered)
    search.attempt(offered)
    right = candidates(launch.spec, current_choice(launch.spec), 66)[0]
    search.attempt(right)
    assert search.refused == [(offered, OTHER_BITS)]
    assert search.choice is None
    search.rest()
    machine = machine_of(torch.device(device, 0) if device == "cuda" else torch.device(device))
    assert machine is not None
    keep_rows(machine, search.rows())
    (row,) = read_table(machine).values()
    assert row.refused == ((offered, OTHER_BITS),)
    assert row.tried == (offered, right)


def test_results_are_the_defaults_after_a_refusal(device: str) -> None:
    launch = multiplied(device, 16, late=True)
    trials = Trials([launch], instant, 1)
    y = next(arg for arg in launch.args if isinstance(arg, Tensor) and arg.shape == (2, 33, 40))
    expected = y.clone()
    with pytest.raises(RefusedError, match=OTHER_BITS):
        trials.ratio(as_choice({"BLOCK_M": 16}))
    assert torch.equal(y, expected)
    assert expected.isfinite().all()


def test_what_a_candidate_does_not_write_is_other_bits(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default's results are in memory before: a candidate must not live on them."""
    launch = launches(device)["quantize"]()
    trials = Trials([launch], instant, 1)
    fewer = dataclasses.replace(launch, grid=(launch.grid[0], launch.grid[1] - 1, 1))
    monkeypatch.setattr(tuning_trials, "retiled", lambda launches, choice: [fewer])
    with pytest.raises(RefusedError, match=OTHER_BITS):
        trials.ratio(current_choice(launch.spec))


def test_what_a_gpu_says_of_a_kernel_refuses_it(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interpreted kernels have neither registers nor shared memory: its answers stand in here."""
    launch = launches(device)["quantize"]()
    (choice, *_) = candidates(launch.spec, current_choice(launch.spec), 10)
    trials = Trials([launch], instant, 1)

    def spills(one: Launch) -> Any:
        start(one)
        return SimpleNamespace(n_spills=2)

    def no_room(one: Launch) -> Any:
        raise OutOfResources(300_000, 232_448, "shared memory")

    for answer, reason in ((spills, SPILLS), (no_room, NO_ROOM)):
        with monkeypatch.context() as patch:
            patch.setattr(tuning_trials, "start", answer)
            with pytest.raises(RefusedError, match=reason):
                trials.ratio(choice)
    assert trials.ratio(choice) == 1.0


class Clock:
    """Seconds that pass when they are asked for."""

    def __init__(self, step: float) -> None:
        self.now, self.step = 0.0, step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


def by_warps(found: Sequence[Launch]) -> Callable[[], float]:
    """A timer for which fewer warps, and products with wide tiles, are faster."""

    def sample() -> float:
        return sum(
            one.spec.num_warps * one.grid[0] / value_of(one.spec, "BLOCK_K") for one in found
        )

    return sample


def specs_of(schedule: Schedule) -> list[KernelSpec]:
    return [one.spec for one in schedule.steps if isinstance(one, Launch)]


@pytest.mark.usefixtures("own_table")
def test_the_whole_tuner(device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A budget that ends early, the command that goes on, a run with nothing to do; one result.

    The command times kernels really; interpreted ones by the host's clock.
    """
    model = tiny_model().to(device)
    gm = fold_constants(model.graph_module)
    x = torch.randn(1, 1, 8, 8, generator=generator(2)).to(device)
    plain = Schedule(gm, x)
    expected = plain(x)
    tasks = find_tasks(plain)
    work = [one.work for one in tasks]
    assert work == sorted(work, reverse=True)

    clock, seen = Clock(1.0), []
    first = tune(
        *(model, (1,), 24.0, lambda *one: seen.append(one)),
        samples=1,
        timer=by_warps,
        clock=clock,
        images=x,
    )
    assert 0 < first.left < 12
    assert first.seconds == clock.now - 1 < 50
    assert len(first.kernels) == len(tasks) > 3, "each had a share"
    assert all(one.new == len(one.row.tried) >= 1 for one in first.kernels)
    total = seen[0][2]
    shown = [("tuning, batch 1", min(done, total), total) for done in range(1, first.new + 1)]
    assert seen == shown
    assert sum(one.row.choice is not None for one in first.kernels) >= 2
    none = tune(model, (1,), 0.5, samples=1, timer=by_warps, clock=Clock(1.0))
    assert (none.new, none.left) == (0, first.left)

    model.to("cpu").save(tmp_path / "model.pt2")
    path, name = tmp_path / "found.json", str(tmp_path / "model.pt2")
    run(TuneRequest(model=name, batches="1", budget=1e6, json=path, quiet=False))
    data = json.loads(path.read_text())
    assert data["left"] == 0
    assert data["tried"] == sum(one["tried_now"] for one in data["kernels"]) >= first.left
    assert sum(one["tried"] for one in data["kernels"]) == first.new + data["tried"]
    if device == "cpu":
        assert all(one["refused"] == {} for one in data["kernels"])
    text = capsys.readouterr().out
    assert "All candidates were tried." in text
    assert all(one["shape"] in text for one in data["kernels"])
    assert data["table"] in text

    again = tune(model.to(device), (1,), 1e6, samples=1, timer=by_warps)
    assert (again.new, again.left) == (0, 0)
    chosen = [one for one in again.kernels if one.row.choice is not None]
    assert all(one.row.ratio <= 0.98 for one in chosen)
    tuned = Schedule(gm, x)
    assert len(specs_of(tuned)) == len(specs_of(plain)), "directions still share a launch"
    pairs = zip(specs_of(tuned), specs_of(plain), strict=True)
    assert sum(one != other for one, other in pairs) >= len(chosen) >= 2
    assert torch.equal(tuned(x), expected)
    assert specs_of(schedule_of(gm, x)) == specs_of(plain)
    model.to("cpu")


def test_faster_by_less_than_two_percent_is_no_choice(device: str) -> None:
    launch = launches(device)["quantize"]()
    (other, *_) = candidates(launch.spec, current_choice(launch.spec), 18)
    for ratio, chosen in ((0.985, None), (0.975, other)):
        trials = Trials([launch], _timer({other: ratio}), 3)
        key = key_of(launch.spec, launch.args)
        task = Task(steps=(0,), launches=(launch,), members={key: launch}, work=1.0)
        search = Search(task, trials=trials)
        search.attempt(other)
        assert search.choice == chosen


def _timer(ratios: dict[Choice, float]) -> Callable[[Sequence[Launch]], Callable[[], float]]:
    """Samples with outliers, whose median is what is wanted."""

    def timer(found: Sequence[Launch]) -> Callable[[], float]:
        ratio = ratios.get(current_choice(found[0].spec), 1.0)
        samples = itertools.cycle((ratio, 50.0, ratio))
        return lambda: next(samples)

    return timer


def test_the_hosts_clock_times_launches(device: str) -> None:
    launch = launches(device)["quantize"]()
    assert host_timer([launch])() > 0
