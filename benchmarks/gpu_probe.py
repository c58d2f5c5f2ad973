"""What a GPU does during calls: seconds by CUDA events, memory, kernel launches.

On a CPU, where the suite is tested, seconds are the host's and the rest is not known (None).
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import nn

from benchmarks.timing import Clock, host_seconds

Call = Callable[[], Any]


def cuda_seconds(call: Call) -> float:
    """Seconds from before a call's first kernel to after its last, launches included."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


class Probe:
    """Measures on one device."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.clock: Clock = cuda_seconds if self.on_gpu else host_seconds

    def held(self) -> int:
        """Bytes that the allocator keeps while nothing runs, in whole segments of 2 MB and more."""
        gc.collect()
        if not self.on_gpu:
            return 0
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    def transient(self, call: Call) -> int | None:
        """Bytes that a call allocates at its peak, beside what is allocated already."""
        if not self.on_gpu:
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def launches(self, call: Call) -> int | None:
        """Kernels of a call, those inside CUDA graphs too; copies and fills apart."""
        if not self.on_gpu:
            return None
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        return sum(
            event.device_type == torch.autograd.DeviceType.CUDA
            and not getattr(event, "is_user_annotation", False)
            and not event.name.startswith(("Memcpy", "Memset"))
            for event in profile.events() or ()
        )

    def require_usable(self, row: str) -> None:
        """Exit if the device takes no more work: after some errors a process never gets it back."""
        if not self.on_gpu:
            return
        try:
            torch.cuda.synchronize()
        except Exception as error:
            raise SystemExit(
                f"the GPU takes no more work after {row} ({type(error).__name__}): start again, "
                "finished rows are kept and this one comes last"
            ) from error


def bytes_of(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers, shared ones once."""
    found = {one.data_ptr(): one for one in chain(module.parameters(), module.buffers())}
    return sum(one.numel() * one.element_size() for one in found.values())
