"""Processes that share the work of synthesis: batch i belongs to process i modulo their number."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Workers:
    """This process's number, and how many there are; more than one need a process group."""

    rank: int = 0
    count: int = 1

    def makes(self, batch: int) -> bool:
        """Is a batch this process's to make?"""
        return batch % self.count == self.rank

    def share(self, batch: int, value: Tensor) -> Tensor:
        """What the maker of a batch holds in `value`, given to all; others pass a place for it."""
        if self.count > 1:
            import torch.distributed as dist

            dist.broadcast(value, src=batch % self.count)
        return value
