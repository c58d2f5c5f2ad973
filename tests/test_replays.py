"""Which batch sizes get a replay: from the second batch on, a bounded number of them."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from torch import Tensor

from ouro_compiler.runtime.replays import Replays


def batch(size: int) -> Tensor:
    return torch.zeros(size, 1)


class Made:
    """Replays are the numbers of the batches they were made for, in order."""

    def __init__(self, kept: int = 2) -> None:
        self.sizes: list[int] = []
        self.pool = Replays(self.make, kept)

    def make(self, images: Tensor) -> str:
        self.sizes.append(len(images))
        return f"{len(self.sizes)}: {len(images)}"


def test_the_second_batch_of_a_size_makes_one() -> None:
    made = Made()
    assert [made.pool.for_batch(batch(3)) for _ in range(3)] == [None, "1: 3", "1: 3"]
    assert made.pool.for_batch(batch(1)) is None
    assert made.pool.seen(1)
    assert not made.pool.seen(2)
    assert made.sizes == [3]


def test_an_empty_batch_never_has_one() -> None:
    made = Made()
    assert [made.pool.for_batch(batch(0)) for _ in range(3)] == [None] * 3
    assert made.sizes == []


def test_the_least_recently_used_is_dropped() -> None:
    made = Made(kept=2)
    for size in (1, 2, 3):
        made.pool.for_batch(batch(size))
    for size in (1, 2, 1, 3):  # 3 drops 2, which was used before 1
        made.pool.for_batch(batch(size))
    assert made.sizes == [1, 2, 3]
    assert len(made.pool) == 2
    assert made.pool.for_batch(batch(1)) == "1: 1"
    assert made.pool.for_batch(batch(2)) == "4: 2"  # made again
    assert len(made.pool) == 2


def test_made_at_once_where_that_is_asked_for() -> None:
    made = Made()
    assert made.pool.made(batch(2)) == made.pool.made(batch(2)) == "1: 2"
    assert not made.pool.seen(2)


def test_one_that_cannot_be_made_is_tried_again() -> None:
    tries: list[int] = []

    def make(images: Tensor) -> str:
        tries.append(len(images))
        if len(tries) == 1:
            raise MemoryError
        return "made"

    pool = Replays(make, 2)
    assert pool.for_batch(batch(1)) is None
    with pytest.raises(MemoryError):
        pool.for_batch(batch(1))
    assert pool.for_batch(batch(1)) == "made"


def test_threads_make_one_for_all() -> None:
    made: list[int] = []

    def make(images: Tensor) -> int:
        time.sleep(0.02)
        made.append(len(images))
        return len(made)

    pool = Replays(make, 2)
    threads = [threading.Thread(target=pool.for_batch, args=(batch(4),)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [4]
