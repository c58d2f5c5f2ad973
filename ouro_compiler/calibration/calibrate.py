"""Calibration by interpretation: run the images through the graph, observe, fill the table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ouro_compiler.calibration.observers import SiteObserver
from ouro_compiler.calibration.recurrence import RecurrenceObserver
from ouro_compiler.config import DynamicOutlierSpec
from ouro_compiler.errors import UsageError
from ouro_compiler.graph import RECURRENCE, Site, SiteParams, all_arguments

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
) -> dict[str, SiteParams]:
    """Run `batches()` twice through `gm` and return the parameters of every site by name.

    batches: a callable giving the same (B, C, H, W) batches each time; total: images in all.
    Raises UsageError if an activation is not finite.
    """
    observers: dict[str, SiteObserver] = {}
    watched: dict[fx.Node, list[SiteObserver]] = {}
    inside: dict[fx.Node, list[Site]] = {}
    for site in sites:
        if site.index in RECURRENCE:
            inside.setdefault(site.node, []).append(site)
        elif site.name not in observers:
            observers[site.name] = SiteObserver(site, spec)
            watched.setdefault(site.source, []).append(observers[site.name])
    scans = {node: RecurrenceObserver(found, spec, total) for node, found in inside.items()}
    for stage, method in (
        ("calibrating: ranges", "observe_range"),
        ("calibrating: histograms", "observe_histogram"),
    ):
        _observe(_Watcher(gm, watched, scans, method), batches, stage, total, progress)
        if method == "observe_range":
            for observer in observers.values():
                observer.freeze_range()
            for scan in scans.values():
                scan.freeze_range()
    found: dict[str, SiteParams] = {name: one.qparams() for name, one in observers.items()}
    for scan in scans.values():
        found |= scan.params()
    return found


def _observe(
    interpreter: _Watcher,
    batches: Batches,
    stage: str,
    total: int,
    progress: Progress | None,
) -> None:
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
    """Runs a graph and hands watched values, and arguments of scans, to their observers."""

    def __init__(
        self,
        gm: fx.GraphModule,
        watched: dict[fx.Node, list[SiteObserver]],
        scans: dict[fx.Node, RecurrenceObserver],
        method: str,
    ) -> None:
        super().__init__(gm)
        self.watched, self.scans, self.method = watched, scans, method

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        for observer in self.watched.get(n, ()):
            x = to_tokens(value, observer.site)
            if not bool(torch.isfinite(x).all()):
                raise UsageError(
                    f"calibration met a value that is not finite at {observer.site.name}: "
                    "check the weights and the images"
                )
            getattr(observer, self.method)(x)
        if n in self.scans:
            arguments = self.map_nodes_to_values(tuple(all_arguments(n)), n)
            getattr(self.scans[n], self.method)(arguments)
        return value
