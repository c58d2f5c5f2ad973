"""Running a graph on a GPU: folded constants, launches in groups, and CUDA graphs by batch size."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx

from ouro_compiler.runtime.cuda_graphs import CudaGraphs, Function
from ouro_compiler.runtime.folding import call_directly, fold_constants
from ouro_compiler.runtime.replays import Replays
from ouro_compiler.runtime.schedule import Schedule

_GRAPHS = 4  # batch sizes whose graphs are kept


class CudaGraphWarning(UserWarning):
    """A batch size runs kernel after kernel, or each launch by itself, for the reason given."""


class CudaRunner:
    """Runs a graph of one input, as the graph itself would, on the device of its constants.

    The first batch of a size goes through the graph; a size that comes again gets a CUDA graph of
    grouped launches (Schedule). capture: makes it, from a function and images (CudaGraphs).
    """

    def __init__(
        self, gm: fx.GraphModule, capture: Callable[[Function, Tensor], Function] | None = None
    ) -> None:
        device = device_of(gm)
        with torch.inference_mode(False), torch.no_grad():
            self._folded = fold_constants(gm)
            self._direct = call_directly(self._folded, device.type)
        self._capture = capture or CudaGraphs(device).capture
        self._graphs = Replays(self._captured, _GRAPHS)

    def __call__(self, images: Tensor, *, graphs: bool = True) -> Any:
        """The graph's outputs for images (B, ...). graphs: by CUDA graphs.

        Where somebody else captures this stream, kernels go into that capture.
        """
        with torch.inference_mode(False), torch.no_grad():
            captured = images.is_cuda and torch.cuda.is_current_stream_capturing()
            if captured or not graphs:
                return self._direct(images)
            return (self._graphs.for_batch(images) or self._direct)(images)

    def _captured(self, images: Tensor) -> Function:
        try:
            return self._capture(self._grouped(images), images)
        except Exception as error:  # whatever a capture raises, the kernels run without it
            return self._without("a CUDA graph", images, error)

    def _grouped(self, images: Tensor) -> Function:
        """The graph with independent launches in groups; elsewhere than on a GPU as it is."""
        if not images.is_cuda:
            return self._direct
        try:
            return Schedule(self._folded, images)
        except Exception as error:  # as above
            return self._without("grouped launches", images, error)

    def _without(self, what: str, images: Tensor, error: Exception) -> Function:
        """The plain graph, and a warning that says why."""
        warnings.warn(
            f"batches of {images.shape[0]} run without {what}: {_cause(error)}",
            CudaGraphWarning,
            stacklevel=3,
        )
        return self._direct


def device_of(gm: fx.GraphModule) -> torch.device:
    """Where a graph's constants are; the CPU if there are none."""
    found = next(chain(gm.parameters(), gm.buffers()), None)
    return torch.device("cpu") if found is None else found.device


def _cause(error: BaseException) -> str:
    """The first line of the error that came first: ending a broken capture raises another."""
    while error.__context__ is not None:
        error = error.__context__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
