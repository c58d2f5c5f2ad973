"""Calibration by interpretation: run the images through the graph, observe, fill the table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ouro_compiler.calibration.observers import SiteObserver
from ouro_compiler.config import DynamicOutlierSpec
from ouro_compiler.errors import UsageError
from ouro_compiler.graph import QParams, Site

# Called with (stage, images done, images in all).
Progress = Callable[[str, int, int], None]
Batches = Callable[[], Iterable[Tensor]]


def to_tokens(x: Tensor, site: Site) -> Tensor:
    """A site's value as (B, L, K) fp32: (B, K, L) or (B, G, N, L) are transposed."""
    if site.transpose:
        x = x.flatten(1, -2).transpose(1, 2)
    return x.float()


def calibrate(
    gm: fx.GraphModule,
    sites: Sequence[Site],
    spec: DynamicOutlierSpec,
    batches: Batches,
    total: int,
    progress: Progress | None = None,
) -> dict[str, QParams]:
    """Run `batches()` twice through `gm` and return the parameters of every site by name.

    batches: a callable giving the same (B, C, H, W) batches each time; total: images in all.
    Raises UsageError if an activation is not finite.
    """
    observers: dict[str, SiteObserver] = {}
    watched: dict[fx.Node, list[SiteObserver]] = {}
    for site in sites:
        if site.name not in observers:
            observers[site.name] = SiteObserver(site, spec)
            watched.setdefault(site.source, []).append(observers[site.name])
    for stage, method in (
        ("calibrating: ranges", SiteObserver.observe_range),
        ("calibrating: histograms", SiteObserver.observe_histogram),
    ):
        _observe(gm, watched, method, batches, stage, total, progress)
        if method is SiteObserver.observe_range:
            for observer in observers.values():
                observer.freeze_range()
    return {name: observer.qparams() for name, observer in observers.items()}


def _observe(
    gm: fx.GraphModule,
    watched: dict[fx.Node, list[SiteObserver]],
    method: Callable[[SiteObserver, Tensor], None],
    batches: Batches,
    stage: str,
    total: int,
    progress: Progress | None,
) -> None:
    interpreter = _Watcher(gm, watched, method)
    done = 0
    for batch in batches():
        with torch.no_grad():
            interpreter.run(batch)
        done += batch.shape[0]
        if progress is not None:
            progress(stage, done, total)
    if done == 0:
        raise UsageError("calibration needs at least one image")


class _Watcher(fx.Interpreter):
    """Runs a graph and hands the watched nodes' values to their observers."""

    def __init__(
        self,
        gm: fx.GraphModule,
        watched: dict[fx.Node, list[SiteObserver]],
        method: Callable[[SiteObserver, Tensor], None],
    ) -> None:
        super().__init__(gm)
        self.watched, self.method = watched, method

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        for observer in self.watched.get(n, ()):
            x = to_tokens(value, observer.site)
            if not bool(torch.isfinite(x).all()):
                raise UsageError(
                    f"calibration met a value that is not finite at {observer.site.name}: "
                    "check the weights and the images"
                )
            self.method(observer, x)
        return value
