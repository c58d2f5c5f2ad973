"""Accuracy, signal-to-noise ratio and outlier shares of a model on images."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx

from ouro_compiler.graph import argument, is_op
from ouro_compiler.ops import QUANTIZERS
from ouro_compiler.ops.quantize import listed_mask


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of rows of logits (n, classes) whose largest entry is the label (n,)."""
    return float((logits.argmax(1) == labels).double().mean())


def snr_db(reference: Tensor, measured: Tensor) -> float:
    """10 log10 of signal power over error power, in decibels; infinite for equal tensors."""
    signal, noise = powers(reference, measured)
    return float(10 * torch.log10(signal / noise))


def powers(reference: Tensor, measured: Tensor) -> Tensor:
    """(2,) fp64: the sums of squares of the reference, and of the error of what was measured."""
    error = measured.double() - reference.double()
    return torch.stack((reference.double().square().sum(), error.square().sum()))


def run_batches(
    model: Callable[[Tensor], Tensor],
    batches: Iterable[Tensor],
    on_batch: Callable[[int], None] | None = None,
) -> Tensor:
    """Outputs (n, ...) of a model over batches, in order; on_batch gets the images done so far."""
    outputs: list[Tensor] = []
    done = 0
    with torch.no_grad():
        for batch in batches:
            outputs.append(model(batch))
            done += batch.shape[0]
            if on_batch is not None:
                on_batch(done)
    return torch.cat(outputs)


class OutlierCounter(fx.Interpreter):
    """Runs a quantized graph and counts, for every quantizer, the elements on an outlier list.

    `counts` maps a site's name to (listed, all).
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.counts: dict[str, tuple[int, int]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if is_op(n, *QUANTIZERS):
            codes, _, start = value[:3]
            listed = listed_mask(
                start, codes.shape[1], argument(n, "refresh_period"), argument(n, "reverse")
            )
            name = site_name(n)
            before, total = self.counts.get(name, (0, 0))
            self.counts[name] = (before + int(listed.sum()), total + listed.numel())
        return value

    def shares(self) -> dict[str, float]:
        """Share of listed elements by site."""
        return {name: listed / total for name, (listed, total) in self.counts.items()}

    def share(self) -> float:
        """Share of listed elements over all sites."""
        listed = sum(count for count, _ in self.counts.values())
        return listed / max(1, sum(total for _, total in self.counts.values()))


def site_name(quantize: fx.Node) -> str:
    """The site of a quantize node, from the name of its scales."""
    return str(argument(quantize, "inlier_scale").target).removesuffix(".inlier_scale")
