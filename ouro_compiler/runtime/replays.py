"""Which batch sizes have a replay of their own, a tape or a CUDA graph: one rule for all."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

from torch import Tensor

Replay = TypeVar("Replay")


class Replays(Generic[Replay]):
    """A bounded pool of replays by batch size; any thread may ask.

    The first batch of a size has none: sizes that never come again cost nothing, and kernels are
    built and checked by then. The second makes one. Of more than `kept` the least recently used is
    dropped.
    """

    def __init__(self, make: Callable[[Tensor], Replay], kept: int) -> None:
        self._make, self._kept = make, kept
        self._seen: Counter[int] = Counter()
        self._found: OrderedDict[int, Replay] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._found)

    def for_batch(self, images: Tensor) -> Replay | None:
        """The replay for images (B, ...); None for the first batch of a size, and empty ones."""
        size = images.shape[0]
        with self._lock:
            self._seen[size] += 1
            if self._seen[size] == 1 or size == 0:
                return None
            return self._used(images)

    def made(self, images: Tensor) -> Replay:
        """The replay for images (B, ...), made if need be."""
        with self._lock:
            return self._used(images)

    def seen(self, size: int) -> bool:
        """Did a batch of this size come?"""
        return self._seen[size] > 0

    def _used(self, images: Tensor) -> Replay:
        size = images.shape[0]
        found = self._found.pop(size, None)
        self._found[size] = self._make(images) if found is None else found
        while len(self._found) > self._kept:
            self._found.popitem(last=False)
        return self._found[size]
