"""Tuning: which blocks, warps and stages a model's kernels run fastest with on this GPU.

No result changes by a bit (`kernels/candidates.py`), so what is found is simply used from then on,
by every model with the same kernels. Not run on a GPU yet.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ouro_compiler.errors import DeviceError, UsageError
from ouro_compiler.kernels.candidates import Choice, current_choice
from ouro_compiler.kernels.launch import Launch, interpreting
from ouro_compiler.kernels.tuned import defaults_only, forget, machine_of
from ouro_compiler.kernels.tuning_table import Row, keep_rows, read_table, table_path
from ouro_compiler.runtime.compiled_model import CompiledModel
from ouro_compiler.runtime.cuda_runner import device_of
from ouro_compiler.runtime.folding import fold_constants
from ouro_compiler.runtime.schedule import Schedule
from ouro_compiler.runtime.tuning_search import Search, resume
from ouro_compiler.runtime.tuning_tasks import find_tasks, observed, schedule_of
from ouro_compiler.runtime.tuning_trials import Timer, Trials, cuda_timer, host_timer

_SAMPLES = 7  # of a candidate and, in turns, of the default
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class TunedKernel:
    """Kernels that run with one choice at one batch size, after tuning; row: of the first one.

    default: what they have otherwise. new: candidates tried in this run; left: those not tried yet.
    """

    batch: int
    label: str
    row: Row
    default: Choice
    new: int
    left: int

    @property
    def refused(self) -> dict[str, int]:
        """How many candidates were refused, by reason."""
        return dict(Counter(reason for _, reason in self.row.refused))


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What `tune` did. path: of the table on disk; seconds: that it took."""

    machine: str
    path: Path
    kernels: tuple[TunedKernel, ...]
    seconds: float

    @property
    def new(self) -> int:
        """Candidates that were tried in this run."""
        return sum(one.new for one in self.kernels)

    @property
    def left(self) -> int:
        """Candidates that the budget did not reach: another run goes on with them."""
        return sum(one.left for one in self.kernels)


def tune(
    compiled: CompiledModel,
    batches: Sequence[int] = (1, 32),
    budget: float = 60.0,
    progress: Progress | None = None,
    *,
    images: Tensor | None = None,
    samples: int = _SAMPLES,
    timer: Timer | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Tuning:
    """Find faster blocks for a model's kernels at some batch sizes, and keep them in the cache.

    budget: seconds, shared by batch sizes and kernels; a candidate that was begun is finished, and
    what is missing is what another run does. images: (N, C, H, W) whose repetitions are the batches
    (noise): outliers decide what products cost. timer, clock: of kernels and of the budget.

    The model's own replays are dropped: its next calls run as tuned. Raises DeviceError without a
    GPU, UsageError if the model is elsewhere or an argument is of no use.
    """
    _check(batches, budget, samples)
    if images is not None:
        compiled._check(images)
    device = device_of(compiled.graph_module)
    machine = _machine(device)
    timer = timer or (cuda_timer(device) if device.type == "cuda" else host_timer)
    begin = clock()
    run = _Run(machine, timer, samples, clock, progress)
    try:
        with torch.inference_mode(False), torch.no_grad(), defaults_only(), _on(device):
            graph = fold_constants(compiled.graph_module)
            for number, batch in enumerate(batches):
                left = begin + budget - clock()
                end = clock() + left / (len(batches) - number)
                given = _images(compiled, batch, images).to(device)
                run.tune_batch(schedule_of(graph, given), given, end)
    finally:  # what was found before an interruption is kept, and counts
        forget()
        compiled._runner = None
    return Tuning(
        machine=machine,
        path=table_path(machine),
        kernels=tuple(run.kernels),
        seconds=clock() - begin,
    )


def _result(state: Search, batch: int) -> TunedKernel:
    first = next(iter(state.task.members.values()))
    return TunedKernel(
        batch=batch,
        label=state.task.label,
        row=state.rows()[0],
        default=current_choice(first.spec),
        new=state.new,
        left=len(state.left),
    )


def tuning_device() -> torch.device:
    """Where kernels are tuned: the GPU; the CPU where Triton interprets. Raises DeviceError."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if not interpreting():
        raise DeviceError(
            "kernels are tuned on the GPU that they will run on, and this machine has no CUDA "
            "device: run it where there is one"
        )
    return torch.device("cpu")


def _check(batches: Sequence[int], budget: float, samples: int) -> None:
    if not batches or any(one < 1 for one in batches):
        raise UsageError(f"batch sizes to tune for are 1 or more, got {list(batches)}")
    if not 0 < budget < float("inf"):
        raise UsageError(f"the budget of tuning is a number of seconds, got {budget}")
    if samples < 1:
        raise UsageError(f"tuning takes at least one sample of each kernel, got {samples}")


def _machine(device: torch.device) -> str:
    found = machine_of(device)
    if found is None:
        wanted = tuning_device()
        raise UsageError(f"the model is on {device}: kernels are tuned on {wanted}, move it there")
    return found


def _images(compiled: CompiledModel, batch: int, images: Tensor | None) -> Tensor:
    """A batch of the images given, repeated, or of noise."""
    if images is None:
        generator = torch.Generator().manual_seed(0)
        return torch.randn([batch, *compiled.manifest["input"]["shape"][1:]], generator=generator)
    return images[torch.arange(batch, device=images.device) % len(images)]


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class _Run:
    """One call of `tune`."""

    def __init__(
        self,
        machine: str,
        timer: Timer,
        samples: int,
        clock: Callable[[], float],
        progress: Progress | None,
    ) -> None:
        self._machine, self._timer, self._samples = machine, timer, samples
        self._clock, self._progress = clock, progress
        self.kernels: list[TunedKernel] = []

    def tune_batch(self, schedule: Schedule, images: Tensor, end: float) -> None:
        """Tune the tasks of a schedule until `end`, by the clock; round by round, each its share.

        What a task does not need of its share is there for the others.
        """
        rows = read_table(self._machine)
        searches = [resume(task, rows) for task in find_tasks(schedule)]
        waiting = [one for one in searches if one.left]
        total = sum(len(one.left) for one in waiting)
        launches: dict[int, Launch] = {}
        if waiting and self._clock() < end:
            launches = observed(schedule, images, [one.task for one in waiting])

        def show(done: int) -> None:
            if self._progress is not None and total:
                self._progress(f"tuning, batch {images.shape[0]}", min(done, total), total)

        while waiting and self._clock() < end:
            for number, search in enumerate(waiting):
                if search.trials is None:
                    mine = [launches[step] for step in search.task.steps]
                    search.trials = Trials(mine, self._timer, self._samples)
                now = self._clock()
                until = now + (end - now) / (len(waiting) - number)
                while search.left and self._clock() < end:
                    search.attempt(search.left[0])
                    show(sum(one.new for one in searches))
                    if self._clock() >= until:
                        break
                search.rest()
                keep_rows(self._machine, search.rows())
            waiting = [one for one in waiting if one.left]
        self.kernels += [_result(one, images.shape[0]) for one in searches]
