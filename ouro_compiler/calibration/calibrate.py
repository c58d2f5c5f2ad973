"""Calibration by interpretation: run the images through the graph, observe, fill the table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
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
Reader = Callable[[Tensor], None]  # of a site's tokens (B, L, K)
ScanReader = Callable[[tuple[Any, ...]], None]  # of all arguments of a scan
Transform = Callable[[Tensor], Tensor]


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
    transforms: Mapping[str, Transform] = MappingProxyType({}),
) -> dict[str, SiteParams]:
    """Run `batches()` twice through `gm` and return the parameters of every site by name.

    batches: a callable giving the same (B, C, H, W) batches each time; total: images in all.
    transforms: by site's name, what its tokens (B, L, K) go through before they are quantized.
    Raises UsageError if an activation is not finite.
    """
    outside = [site for site in sites if site.index not in RECURRENCE]
    inside: dict[fx.Node, list[Site]] = {}
    for site in sites:
        if site.index in RECURRENCE:
            inside.setdefault(site.node, []).append(site)
    scans = {node: RecurrenceObserver(found, spec, total) for node, found in inside.items()}
    observers = observe_sites(gm, outside, spec, batches, total, progress, transforms, scans)
    found: dict[str, SiteParams] = {name: one.qparams() for name, one in observers.items()}
    for scan in scans.values():
        found |= scan.params()
    return found


def observe_sites(
    gm: fx.GraphModule,
    sites: Sequence[Site],
    spec: DynamicOutlierSpec,
    batches: Batches,
    total: int,
    progress: Progress | None = None,
    transforms: Mapping[str, Transform] = MappingProxyType({}),
    scans: Mapping[fx.Node, RecurrenceObserver] = MappingProxyType({}),
) -> dict[str, SiteObserver]:
    """The observers that `calibrate` takes parameters from, after both of their rounds."""
    observers: dict[str, SiteObserver] = {}
    for site in sites:
        if site.name not in observers:
            observers[site.name] = SiteObserver(site, spec)
    for stage, method in (
        ("calibrating: ranges", "observe_range"),
        ("calibrating: histograms", "observe_histogram"),
    ):
        readers = {
            name: _reader(getattr(observer, method), transforms.get(name))
            for name, observer in observers.items()
        }
        at_scans = {node: getattr(scan, method) for node, scan in scans.items()}
        watch_sites(gm, sites, readers, batches, stage, total, progress, at_scans)
        if method == "observe_range":
            for observer in observers.values():
                observer.freeze_range()
            for scan in scans.values():
                scan.freeze_range()
    return observers


def channel_peaks(
    gm: fx.GraphModule,
    sites: Sequence[Site],
    batches: Batches,
    total: int,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """The largest |x| of every channel (K,) of every site, by name, in one run of the images."""
    peaks: dict[str, Tensor] = {}

    def reader(name: str) -> Reader:
        def read(x: Tensor) -> None:
            peak = x.abs().amax((0, 1))
            peaks[name] = torch.maximum(peaks[name], peak) if name in peaks else peak

        return read

    readers = {site.name: reader(site.name) for site in sites}
    watch_sites(gm, sites, readers, batches, "calibrating: channels", total, progress)
    return peaks


def _reader(method: Reader, transform: Transform | None) -> Reader:
    def read(x: Tensor) -> None:
        method(x if transform is None else transform(x))

    return read


def watch_sites(
    gm: fx.GraphModule,
    sites: Sequence[Site],
    readers: Mapping[str, Reader],
    batches: Batches,
    stage: str,
    total: int,
    progress: Progress | None = None,
    scans: Mapping[fx.Node, ScanReader] = MappingProxyType({}),
) -> None:
    """Run the images once; each site's name has one reader, called with its tokens (B, L, K).

    scans: readers of all arguments of a scan's call.
    """
    watched: dict[fx.Node, dict[str, Site]] = {}
    named: set[str] = set()
    for site in sites:
        if site.name not in named:
            named.add(site.name)
            watched.setdefault(site.source, {})[site.name] = site
    interpreter = _Watcher(gm, watched, readers, scans)
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
    """Runs a graph and hands values of sites, and arguments of scans, to their readers."""

    def __init__(
        self,
        gm: fx.GraphModule,
        watched: Mapping[fx.Node, Mapping[str, Site]],
        readers: Mapping[str, Reader],
        scans: Mapping[fx.Node, ScanReader],
    ) -> None:
        super().__init__(gm)
        self.watched, self.readers, self.scans = watched, readers, scans

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        for name, site in self.watched.get(n, {}).items():
            x = to_tokens(value, site)
            if not bool(torch.isfinite(x).all()):
                raise UsageError(
                    f"calibration met a value that is not finite at {name}: "
                    "check the weights and the images"
                )
            self.readers[name](x)
        if n in self.scans:
            arguments: Any = self.map_nodes_to_values(tuple(all_arguments(n)), n)
            self.scans[n](arguments)
        return value
