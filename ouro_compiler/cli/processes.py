"""Several processes for one command, as `torchrun` starts them: RANK, WORLD_SIZE, LOCAL_RANK."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from ouro_compiler.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from ouro_compiler.calibration.synthesis.workers import Workers

_PATIENCE = timedelta(days=7)  # the last process may have a batch more to make than the others


def is_first() -> bool:
    """Is this the process that speaks and writes?"""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def process_group() -> Iterator[Workers]:
    """The processes of this command, joined while they work; one where torchrun started none.

    Only finished images and counts travel between them, from main memory, so the group is gloo's on
    every device. Raises UsageError if the environment is not torchrun's.
    """
    from ouro_compiler.calibration.synthesis.workers import Workers

    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield Workers()
        return
    import torch.distributed as dist

    try:
        dist.init_process_group("gloo", timeout=_PATIENCE)
    except (ValueError, RuntimeError) as error:
        raise UsageError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but the processes cannot be joined "
            f"({str(error).splitlines()[0]}): start them with torchrun"
        ) from error
    try:
        yield Workers(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def add_up(value: Tensor, workers: Workers, *, largest: bool = False) -> Tensor:
    """A tensor summed over the processes, in place, or the largest of each element.

    Raises UsageError where another process has stopped.
    """
    if workers.count > 1:
        import torch.distributed as dist

        try:
            dist.all_reduce(value, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
        except RuntimeError as error:
            raise UsageError("another process stopped early: its own message says why") from error
    return value


def device_of_process(name: str) -> str:
    """cpu or cuda -> this process's own. Raises DeviceError if there is none."""
    from ouro_compiler.runtime.compiled_model import resolve_device

    device = resolve_device(name)
    if device.type != "cuda" or "LOCAL_RANK" not in os.environ:
        return str(device)
    import torch

    return f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
