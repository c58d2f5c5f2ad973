"""Running a graph on a CPU: folded constants, direct calls, and a tape for every batch size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ouro_compiler.runtime.folding import call_directly, fold_constants
from ouro_compiler.runtime.replays import Replays
from ouro_compiler.runtime.tape import Tape

_TAPES = 2  # batch sizes whose memory is kept


class CpuRunner:
    """Runs a graph of one input, a size bit for bit the same each time.

    The bits are the graph's, but for batches of one whose convolutions choose another memory format
    there (`folding.unflatten`).

    The first batch of a size goes through the graph; a size that comes again gets a tape.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        with torch.inference_mode():
            folded = fold_constants(gm)
            self._direct = call_directly(folded, "cpu")
        self._tapes = Replays(lambda images: Tape(folded, images), _TAPES)

    def __call__(self, images: Tensor) -> Any:
        """The graph's outputs for images (B, ...)."""
        with torch.inference_mode():
            outputs = (self._tapes.for_batch(images) or self._direct)(images)
        # What leaves may be used under autograd, which inference tensors may not.
        return pytree.tree_map_only(Tensor, Tensor.clone, outputs)

    def traced(self, images: Tensor, labels: Mapping[str, str]) -> Any:
        """A run on a tape under `torch.profiler`: steps go by their node's label, or its name."""
        if not self._tapes.seen(images.shape[0]):
            self(images)  # tapes are made of kernels that were built and checked
        with torch.inference_mode():
            outputs = self._tapes.made(images).traced(images, labels)
        return pytree.tree_map_only(Tensor, Tensor.clone, outputs)
