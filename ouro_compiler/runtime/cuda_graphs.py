"""CUDA graphs of functions of a batch: captured once, replayed on fixed memory.

Not run on a GPU yet.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Function = Callable[[Tensor], Any]

_WARM_UPS = 2  # runs before a capture: libraries are loaded, kernels built, workspaces allocated
_CAPTURING = threading.Lock()  # PyTorch allows one capture at a time in a process


class CudaGraphs:
    """Captures functions on one device into graphs that share a pool of memory.

    Since they share it, replays take turns: threads by a lock, streams by an event.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # of warm-ups and captures, not of replays
        self._pool = torch.cuda.graph_pool_handle()
        self._done = torch.cuda.Event()  # the end of the last replay
        self._lock = threading.Lock()

    def capture(self, function: Function, images: Tensor) -> Function:
        """What computes the same for images of this shape and dtype, in one launch.

        Raises what the function or the capture raises. Synchronises the device.
        """
        graph = torch.cuda.CUDAGraph()
        # The outer context puts the current stream back even after a capture that fails.
        with (
            _CAPTURING,
            self._lock,
            torch.cuda.device(self._device),
            torch.cuda.stream(self._stream),
        ):
            torch.cuda.synchronize()
            # On this stream, so that its memory is used again only behind the last replay.
            static = torch.empty_like(images, memory_format=torch.contiguous_format)
            static.copy_(images)
            for _ in range(_WARM_UPS):
                function(static)
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                outputs = function(static)

        def replay(images: Tensor) -> Any:
            with self._lock, torch.cuda.device(self._device):
                stream = torch.cuda.current_stream()
                stream.wait_event(self._done)
                try:
                    static.copy_(images)
                    graph.replay()
                    return pytree.tree_map_only(Tensor, Tensor.clone, outputs)
                finally:
                    self._done.record(stream)

        return replay
