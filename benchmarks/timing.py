"""Timing in turns: A B C A B C ..., so that what disturbs the machine disturbs everybody."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any

Clock = Callable[[Callable[[], Any]], float]  # calls it once; seconds

TURN_SECONDS = 0.1  # what is faster is called several times in its turn
SLOW_SECONDS = 1.0  # what is slower takes part in a third of the rounds


@dataclass
class Candidate:
    """Something to time; `context` is entered for each of its turns, outside the timed part.

    repeats: how often a call does what is timed.
    """

    name: str
    call: Callable[[], Any]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    repeats: int = 1
    seconds: list[float] = field(default_factory=list)


def host_seconds(call: Callable[[], Any]) -> float:
    """What a call takes by the host's clock."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def take_turns(candidates: Sequence[Candidate], rounds: int, clock: Clock = host_seconds) -> None:
    """Warm every candidate up by one turn, then time `rounds` turns of each, in order."""
    calls = {id(one): _warm_up(one, clock) for one in candidates}
    for number in range(rounds):
        for one in candidates:
            count, seconds = calls[id(one)]
            if seconds > SLOW_SECONDS and number % 3:
                continue
            with one.context():
                if seconds < TURN_SECONDS:
                    one.call()  # the caches hold what another left there
                for _ in range(count):
                    one.seconds.append(clock(one.call) / one.repeats)
        gc.collect()


def _warm_up(one: Candidate, clock: Clock) -> tuple[int, float]:
    """(calls in a turn, seconds of a call)."""
    with one.context():
        first = clock(one.call)
        seconds = first
        count = 1 if first > SLOW_SECONDS else 3
        for _ in range(count):
            seconds = min(seconds, clock(one.call))
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
