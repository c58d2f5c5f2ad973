"""Suite "fidelity": how far quantized models of full size stray from floating point, by layer.

    python -m benchmarks.run --suite fidelity --json FILE [--models vim_small,vmamba_tiny_s1l8]
        [--images 2] [--seeds 0] [--filter REGEX]

Rows "fidelity/MODEL/PRESET/RECIPE": the SNR of the logits, equal predictions, and the SNR of every
quantized layer's output against the same layer's in floating point, errors of the layers before it
included. Random weights (seeded) of the public sizes, noise of 224 x 224 pixels: `--images` of them
calibrate and as many others are measured. It says how errors grow with depth and which kinds of
layers make them; not what accuracy a trained model loses, since random weights have few outliers
and their logits hardly differ between classes, and of so few images equal predictions say little.
Layers are compared before fusion, where each still has an output of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from benchmarks.registry import Row, suite
from benchmarks.resume import Rows
from ouro_compiler.calibration.images import TensorImages
from ouro_compiler.comparison import failed_row
from ouro_compiler.compiler import prepare
from ouro_compiler.config import PRESETS, QuantConfig
from ouro_compiler.evaluation import powers
from ouro_compiler.frontend.capture import capture, exported
from ouro_compiler.frontend.detect import ARCHITECTURES
from ouro_compiler.graph import all_arguments, is_op
from ouro_compiler.passes import QUANTIZE
from ouro_compiler.passes.base import PassContext, pass_name, run_passes
from ouro_compiler.recipes import RECIPES, find_recipe
from ouro_compiler.recipes.planning import Plan

MODELS = "vim_small,vmamba_tiny_s1l8"
BITS = ("w8a8", "w4a4")
_SCAN = torch.ops.ouro.selective_scan.default


@suite("fidelity")
def fidelity(options: argparse.Namespace) -> list[Row]:
    """A row a model, preset and recipe."""
    rows = Rows(options.json, "fidelity", options.filter or "")
    seeds = [int(seed) for seed in options.seeds.split(",")]
    for name in (options.models or MODELS).split(","):
        for row in rows_of(name, seeds[:1], options.images, rows):
            rows.add(row)
    return rows.rows


def rows_of(name: str, seeds: list[int], images: int, rows: Rows) -> Iterator[Row]:
    """The rows of one model that are wanted; it is built and exported once a seed."""
    for seed in seeds:
        program: torch.export.ExportedProgram | None = None
        for bits in BITS:
            for recipe in RECIPES:
                row = f"fidelity/{name}/{bits}/{recipe}"
                if not rows.wants(row, seed):
                    continue
                if program is None:
                    program, example = _random_model(name, seed)
                config = dataclasses.replace(PRESETS[bits], recipe=recipe, seed=seed)
                shape = (images, *example.shape[1:])
                given = [
                    torch.randn(shape, generator=torch.Generator().manual_seed(2 * seed + part))
                    for part in range(2)
                ]
                try:
                    found = {**layer_errors(program, example, config, *given), "reason": None}
                except Exception as error:  # a method that fails must not cost the others theirs
                    found = failed_row(error)
                yield {"row": row, "seed": seed, "images": images, **found}


def layer_errors(
    program: torch.export.ExportedProgram,
    example: Tensor,
    config: QuantConfig,
    calibration: Tensor,
    images: Tensor,
) -> Row:
    """SNR (dB) of the logits and of every quantized layer's output; None where nothing differs.

    None too for scans whose D u or gate moved behind them (ksq): their outputs mean something else.
    layers: name, kind and snr_db, in the graph's order.
    """
    start = time.perf_counter()
    original = capture(program, example)
    plan = prepare(original, config)
    kinds = {row.name: row.kind for row in plan.rows if row.status != "skipped"}
    with torch.no_grad():
        expected = _Outputs(original, {plan.nodes[name].name: name for name in kinds})
        logits = expected.run(images)
        quantized = capture(program, example)
        other = prepare(quantized, config)
        _simulate(quantized, other, config, calibration)
        nodes = _nodes_of(quantized, other, kinds)
        moved = _with_parts_behind(quantized, plan, nodes)
        measured = _Outputs(quantized, nodes, expected.kept)
        found = measured.run(images)
    first, second = (one if isinstance(one, Tensor) else one[0] for one in (logits, found))
    layers = [
        {
            "layer": name,
            "kind": kinds[name],
            "snr_db": None if name in moved else _decibels(*measured.powers[name]),
        }
        for name in kinds
    ]
    return {
        "logits_snr_db": _decibels(*powers(first, second).tolist()),
        "agreement": float((first.argmax(1) == second.argmax(1)).double().mean()),
        "seconds": round(time.perf_counter() - start, 1),
        "layers": layers,
    }


def _simulate(gm: fx.GraphModule, plan: Plan, config: QuantConfig, calibration: Tensor) -> None:
    """Calibrate and insert quantizers, in place; no fusion, so that layers keep their outputs."""
    recipe = find_recipe(config.recipe)
    config = recipe.configure(config)
    images = TensorImages(calibration)
    found = recipe.calibrate(gm, plan, config, images, batch_size=len(images))
    context = PassContext(config=config, sites=plan.sites, calibration=found)
    inserting = [one for one in QUANTIZE if not pass_name(one).startswith("fuse_")]
    run_passes(gm, inserting, context)


def _nodes_of(gm: fx.GraphModule, plan: Plan, layers: Iterable[str]) -> dict[str, str]:
    """Layers by the name of the node that computes them: their own, or what took its place."""
    there = {node.name for node in gm.graph.nodes}
    made = {node.meta.get("ouro_layer"): node.name for node in gm.graph.nodes}  # the last one
    found = {}
    for layer in layers:
        own = plan.nodes[layer].name
        name = own if own in there else made.get(layer)
        if name is None:
            raise ValueError(f"no node computes {layer} once quantizers are inserted")
        found[name] = layer
    return found


def _with_parts_behind(gm: fx.GraphModule, plan: Plan, nodes: dict[str, str]) -> set[str]:
    """Layers of nodes that are scans without the D or z that the same scan had before."""
    there = {node.name: node for node in gm.graph.nodes}
    found = set()
    for name, layer in nodes.items():
        before = plan.nodes[layer]
        if is_op(before, _SCAN):
            parts = [all_arguments(one)[5:7] for one in (before, there[name])]
            if any(mine is not None and left is None for mine, left in zip(*parts, strict=True)):
                found.add(layer)
    return found


class _Outputs(fx.Interpreter):
    """Runs a graph and keeps the outputs of some nodes, or holds them against kept ones."""

    def __init__(
        self, gm: fx.GraphModule, names: dict[str, str], kept: dict[str, Tensor] | None = None
    ) -> None:
        super().__init__(gm)
        self._names, self._against = names, kept
        self.kept: dict[str, Tensor] = {}
        self.powers: dict[str, tuple[float, float]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        name = self._names.get(n.name)
        if name is not None and self._against is None:
            self.kept[name] = value
        elif name is not None and self._against is not None:
            signal, noise = powers(self._against.pop(name), value).tolist()
            self.powers[name] = (signal, noise)
        return value


def _decibels(signal: float, noise: float) -> float | None:
    if not (signal > 0 and noise > 0):
        return None
    return round(float(10 * torch.log10(torch.tensor(signal / noise))), 3)


def _random_model(name: str, seed: int) -> tuple[torch.export.ExportedProgram, Tensor]:
    torch.manual_seed(seed)
    config: Any = ARCHITECTURES[name]
    module = config.build().eval().requires_grad_(False)
    example = torch.randn(2, config.in_chans, config.img_size, config.img_size)
    return exported(module, example), example
