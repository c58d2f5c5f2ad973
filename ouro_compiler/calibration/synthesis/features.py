"""The graph, run with its feature losses: L^C of every layer as the image passes through."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.checkpoint import checkpoint

from ouro_compiler.calibration.synthesis.attention import (
    ScanOperands,
    attention_rows,
    explicit_attention_rows,
    patched_outputs,
)
from ouro_compiler.calibration.synthesis.contrastive import contrastive_loss
from ouro_compiler.calibration.synthesis.positions import Grid, find_grids
from ouro_compiler.config import SynthesisSpec
from ouro_compiler.graph import argument, aten, is_op, value_of

_SCAN = torch.ops.ouro.selective_scan.default
_ATTENTION = aten.scaled_dot_product_attention.default
_SMALLEST = 3  # cells along a grid's shorter side: fewer have no neighbourhoods to compare


@dataclass
class FeatureLayer:
    """Scans, or an attention, whose features are averaged and compared together."""

    name: str
    operators: list[tuple[fx.Node, Grid]] = field(default_factory=list)


def find_layers(gm: fx.GraphModule) -> tuple[list[FeatureLayer], list[str]]:
    """The layers of a normalised graph with a map of patches, and notes on those without.

    Scans that share an owner (the directions of one mixer) are one layer.
    """
    axes = {node: 2 for node in gm.graph.nodes if is_op(node, _SCAN)}
    axes |= {n: 2 for n in gm.graph.nodes if is_op(n, _ATTENTION) and value_of(n).dim() == 4}
    grids = find_grids(gm, axes)
    layers: dict[str, FeatureLayer] = {}
    placeless = small = 0
    for node in axes:
        grid = grids.get(node)
        if grid is None:
            placeless += 1
        elif min(grid.height, grid.width) < _SMALLEST:
            small += 1
        else:
            name = _owner(node)
            while name in layers and not _same(layers[name].operators[0][1], grid):
                name += "'"
            layers.setdefault(name, FeatureLayer(name)).operators.append((node, grid))
    notes = []
    if placeless:
        notes.append(f"synthesis: {placeless} scans or attentions have no map of patches")
    if small:
        notes.append(f"synthesis: {small} scans or attentions have fewer than 3 x 3 patches")
    return list(layers.values()), notes


def _same(one: Grid, other: Grid) -> bool:
    return (one.height, one.width, one.windows) == (other.height, other.width, other.windows)


def _owner(node: fx.Node) -> str:
    """`layers.0.mixer` of a scan whose A is `layers.0.mixer.A`; else the node's own name."""
    if not is_op(node, _SCAN):
        return node.name
    A = argument(node, "A")
    return str(A.target).rpartition(".")[0] or node.name if A.op == "get_attr" else node.name


class FeatureRunner(fx.Interpreter):
    """Runs a graph on images that need gradients, and adds up the layers' contrastive losses.

    Implicit attention is recomputed in the backward pass: what stays in memory are the graph's own
    values and outputs of patches.
    """

    def __init__(self, gm: fx.GraphModule, layers: list[FeatureLayer], spec: SynthesisSpec) -> None:
        super().__init__(gm)
        self.spec, self.count = spec, len(layers)
        self.layer_of = {node: one for one in layers for node, _ in one.operators}
        self.grid_of = {node: grid for one in layers for node, grid in one.operators}
        self.features: dict[str, list[Tensor]] = {}
        self.losses: list[Tensor] = []
        self.generator = torch.Generator()

    def __call__(self, images: Tensor, generator: torch.Generator) -> tuple[Any, Tensor]:
        """(B, C, H, W) -> the graph's output, and L^C of each image (B,), a mean over layers.

        generator: chooses the channels whose implicit attention is looked at (features `alpha`).
        """
        self.features, self.losses, self.generator = {}, [], generator
        output = self.run(images)
        if not self.losses:
            return output, images.new_zeros(len(images))
        return output, torch.stack(self.losses).sum(0) / self.count

    def run_node(self, n: fx.Node) -> Any:
        if n in self.layer_of and self.spec.contrastive_weight:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            self._observe(n, args, kwargs)
        return super().run_node(n)

    def _observe(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        layer, grid = self.layer_of[node], self.grid_of[node]
        found = self.features.setdefault(layer.name, [])
        read = functools.partial(self._attention, grid)
        if is_op(node, _SCAN):
            read = functools.partial(self._scan, grid, self._channels(args[0].shape[1]))
        found.append(self._remember_little(read, *args, **kwargs))
        if len(found) == len(layer.operators):
            self.losses.append(self._remember_little(self._loss, grid, *found))
            del self.features[layer.name]

    def _remember_little(self, read: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """read(...), recomputed in the backward pass but where its own memory is small."""
        if self.spec.features == "yp":
            return read(*args, **kwargs)
        found: Tensor = checkpoint(read, *args, use_reentrant=False, **kwargs)
        return found

    def _channels(self, channels: int) -> Tensor | None:
        """Channels to look at, None for all of them."""
        if self.spec.features == "yp" or self.spec.alpha_channels >= channels:
            return None
        drawn = torch.randperm(channels, generator=self.generator)[: self.spec.alpha_channels]
        return drawn.sort().values

    def _scan(self, grid: Grid, chosen: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        scan = ScanOperands.of(*args, **kwargs)
        if chosen is not None:
            scan = scan.channels(chosen.to(scan.u.device))
        read = attention_rows if self.spec.features == "alpha" else patched_outputs
        return read(scan, grid, self.spec.patch, self.spec.hidden)

    def _attention(
        self, grid: Grid, query: Tensor, key: Tensor, value: Tensor, *_args: Any, **kwargs: Any
    ) -> Tensor:
        del value
        scale = kwargs.get("scale") or 1 / math.sqrt(query.shape[-1])
        return explicit_attention_rows(query, key, scale, grid, self.spec.patch)

    def _loss(self, grid: Grid, *features: Tensor) -> Tensor:
        return contrastive_loss(
            torch.stack(features).mean(0),
            grid,
            patch=self.spec.patch,
            positives=self.spec.positives,
            temperature=self.spec.temperature,
        )
