"""One candidate: compiled, compared with the default bit for bit on real operands, then timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ouro_compiler.kernels.cache import load_kernel
from ouro_compiler.kernels.candidates import Choice
from ouro_compiler.kernels.grouping import split
from ouro_compiler.kernels.launch import Launch, launch_options, start
from ouro_compiler.kernels.retile import outputs
from ouro_compiler.runtime.cuda_graphs import CudaGraphs
from ouro_compiler.runtime.tuning_tasks import retiled

Timer = Callable[[Sequence[Launch]], Callable[[], float]]  # makes what takes a sample, in seconds

OTHER_BITS = "other bits than the default"
NO_COMPILE = "does not compile"
NO_ROOM = "exceeds a multiprocessor's resources"
SPILLS = "spills registers"
_LAUNCHES = 20  # in a CUDA graph that is a sample
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class RefusedError(Exception):
    """A candidate that is not timed; the reason is one of those above."""


def host_timer(launches: Sequence[Launch]) -> Callable[[], float]:
    """A sample is one run by the host's clock: for kernels that are interpreted."""

    def sample() -> float:
        begin = time.perf_counter()
        for one in launches:
            start(one)
        return time.perf_counter() - begin

    return sample


def cuda_timer(device: torch.device) -> Timer:
    """A sample is one replay of a CUDA graph of several runs, by events; L2 caches stay warm."""
    graphs = CudaGraphs(device)
    nothing = torch.zeros(1, device=device)

    def timer(launches: Sequence[Launch]) -> Callable[[], float]:
        def run(_: Tensor) -> None:
            for one in [*launches] * _LAUNCHES:
                start(one)

        replay = graphs.capture(run, nothing)

        def sample() -> float:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            with torch.cuda.device(device):
                begin.record()
                replay(nothing)
                end.record()
                end.synchronize()
            return begin.elapsed_time(end) / 1e3 / _LAUNCHES

        return sample

    return timer


class Trials:
    """Candidates for launches on real memory, each compared with their default and timed in turns.

    The launches' outputs hold the default's results afterwards.
    """

    def __init__(self, launches: Sequence[Launch], timer: Timer, samples: int) -> None:
        self._launches, self._timer, self._samples = launches, timer, samples
        for one in launches:
            start(one)
        self._outputs = [
            out for one in launches for member in split(one) for out in outputs(member)
        ]
        self._expected = [_bits(one).clone() for one in self._outputs]
        self._sample_default: Callable[[], float] | None = None
        self.default_seconds: list[float] = []

    def ratio(self, choice: Choice) -> float:
        """A candidate's median time over the default's. Raises RefusedError."""
        launches = retiled(self._launches, choice)
        try:
            self._check(launches)
        finally:
            for out, expected in zip(self._outputs, self._expected, strict=True):
                _bits(out).copy_(expected)
        sample = self._timer(launches)
        ours, theirs = [], []
        for _ in range(self._samples):
            theirs.append(self._default())
            ours.append(sample())
        return median(ours) / median(theirs)

    def measure_default(self) -> float:
        """Seconds of the default, the median of all samples so far."""
        while len(self.default_seconds) < self._samples:
            self._default()
        return median(self.default_seconds)

    def _default(self) -> float:
        if self._sample_default is None:
            self._sample_default = self._timer(self._launches)
        self.default_seconds.append(self._sample_default())
        return self.default_seconds[-1]

    def _check(self, launches: Iterable[Launch]) -> None:
        from triton.runtime.errors import OutOfResources

        for one in launches:
            compile_candidate(one)
        for out, expected in zip(self._outputs, self._expected, strict=True):
            _bits(out).copy_(~expected)  # what a candidate does not write is wrong
        for one in launches:
            try:
                kernel = start(one)
            except OutOfResources as error:
                raise RefusedError(NO_ROOM) from error
            if getattr(kernel, "n_spills", 0):
                raise RefusedError(SPILLS)
        for out, expected in zip(self._outputs, self._expected, strict=True):
            if not torch.equal(_bits(out), expected):
                raise RefusedError(OTHER_BITS)


def compile_candidate(launch: Launch) -> None:
    """Compile a launch, as launching it would, without that. Raises RefusedError."""
    kernel: Any = load_kernel(launch.spec)
    try:
        kernel.warmup(*launch.args, grid=launch.grid, **launch_options(launch.spec))
    except Exception as error:  # whatever a compiler raises; nothing ran yet
        raise RefusedError(NO_COMPILE) from error


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(_INTEGERS[tensor.element_size()])
