"""Timing in turns: A B C A B C ..., so that what disturbs the machine disturbs everybody."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any

TURN_SECONDS = 0.1  # what is faster is called several times in its turn
SLOW_SECONDS = 1.0  # what is slower takes part in a third of the rounds


@dataclass
class Candidate:
    """Something to time; `context` is entered for each of its turns, outside the timed part."""

    name: str
    call: Callable[[], Any]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    seconds: list[float] = field(default_factory=list)


def take_turns(candidates: Sequence[Candidate], rounds: int) -> None:
    """Warm every candidate up by one turn, then time `rounds` turns of each, in order."""
    calls = {id(one): _warm_up(one) for one in candidates}
    for number in range(rounds):
        for one in candidates:
            count, seconds = calls[id(one)]
            if seconds > SLOW_SECONDS and number % 3:
                continue
            with one.context():
                if seconds < TURN_SECONDS:
                    one.call()  # the caches hold what another left there
                for _ in range(count):
                    start = time.perf_counter()
                    one.call()
                    one.seconds.append(time.perf_counter() - start)
        gc.collect()


def _warm_up(one: Candidate) -> tuple[int, float]:
    """(calls in a turn, seconds of a call)."""
    with one.context():
        start = time.perf_counter()
        one.call()
        first = time.perf_counter() - start
        seconds = first
        count = 1 if first > SLOW_SECONDS else 3
        for _ in range(count):
            start = time.perf_counter()
            one.call()
            seconds = min(seconds, time.perf_counter() - start)
    return max(1, min(1000, int(TURN_SECONDS / seconds))), seconds


def summary(seconds: Sequence[float]) -> dict[str, float | int]:
    """Milliseconds: median, quartiles and extremes, and how many calls they are of."""
    spread = [seconds[0]] * 3 if len(seconds) == 1 else quantiles(seconds, method="inclusive")
    values = {
        "ms": median(seconds),
        "ms_min": min(seconds),
        "ms_q1": spread[0],
        "ms_q3": spread[2],
        "ms_max": max(seconds),
    }
    return {**{key: 1e3 * value for key, value in values.items()}, "calls": len(seconds)}
