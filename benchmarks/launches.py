"""Suite "launches": what one block launches and calls on a GPU, and roofline estimates of it.

    python -m benchmarks.run --suite launches [--models vim_tiny,vmamba_tiny_s1l8] [--batches 1,32]

Random weights, W4A4. Models have one block of a kind each, of Vim the last of two layers, and are
scaled by their depth. Calls without a kernel are counted and listed, not estimated.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

import ouro_compiler as ouro
from benchmarks.registry import Row, suite
from benchmarks.roofline import GPUS, Work, work_of
from ouro_compiler.data import noise_images
from ouro_compiler.errors import UsageError
from ouro_compiler.frontend.preprocessing import expected_preprocessing
from ouro_compiler.kernels.launch import Launch
from ouro_compiler.models import mambavision, vim, vmamba
from ouro_compiler.runtime.folding import fold_constants
from ouro_compiler.runtime.record import Call, Step
from ouro_compiler.runtime.schedule import Schedule

DEFAULT = "vim_tiny,vim_small,vim_base,vmamba_tiny_s1l8,vmamba_base_s1l20,mambavision_tiny"
BATCHES = "1,32"
_COVERAGES = ("none", "params")


@dataclasses.dataclass(frozen=True)
class Part:
    """A kind of block: what the names of its constants begin with, and how many a model has."""

    name: str
    prefix: str
    count: int


@suite("launches")
def launches(options: argparse.Namespace) -> list[Row]:
    """Rows of every launch of a block, of the block, and of a model; prints the last two."""
    names = (options.models or DEFAULT).split(",")
    known = [*vim.ARCHITECTURES, *vmamba.ARCHITECTURES, *mambavision.ARCHITECTURES]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UsageError(
            f"{unknown[0]} has no blocks that are counted: choose of {', '.join(known)}"
        )
    batches = [int(one) for one in (options.batches or BATCHES).split(",")]
    rows: list[Row] = []
    print(f"{'model, ssm, batch, block':54s} blocks  launches  alone  calls     MB  {_header()}")
    for name in names:
        for ssm in _COVERAGES:
            for found in measure(name, ssm, batches):
                rows += found
                for row in found:
                    if row["kind"] != "launch":
                        print(_line(row), flush=True)
    return rows


def shortened(name: str) -> tuple[Any, list[Part]]:
    """A model's configuration with a block of every kind, and its kinds of blocks."""
    if name in vim.ARCHITECTURES:
        whole = vim.ARCHITECTURES[name]
        return dataclasses.replace(whole, depth=2), [Part("layer", "layers.1.", whole.depth)]
    if name in vmamba.ARCHITECTURES:
        pyramid = vmamba.ARCHITECTURES[name]
        parts = [
            Part(f"stage {stage}", f"layers.{stage}.blocks.0.", depth)
            for stage, depth in enumerate(pyramid.depths)
        ]
        return dataclasses.replace(pyramid, depths=(1,) * len(parts)), parts
    hybrid = mambavision.ARCHITECTURES[name]
    parts = []
    for stage in (2, 3):  # the others are convolutions
        scans, prefix = hybrid.attention_starts(stage), f"levels.{stage}.blocks."
        parts += [
            Part(f"stage {stage}, scan", f"{prefix}0.", scans),
            Part(f"stage {stage}, attention", f"{prefix}1.", hybrid.depths[stage] - scans),
        ]
    return dataclasses.replace(hybrid, depths=(1, 1, 2, 2)), [one for one in parts if one.count]


def measure(name: str, ssm: str, batches: list[int]) -> Iterator[list[Row]]:
    """For each batch size the rows of the blocks' launches, each block's own, and the model's."""
    config, parts = shortened(name)
    torch.manual_seed(0)
    model = config.build().eval().requires_grad_(False)
    preprocessing = expected_preprocessing(config)
    compiled = ouro.compile(
        model,
        torch.zeros(1, config.in_chans, config.img_size, config.img_size),
        dataclasses.replace(ouro.W4A4, ssm=ssm),  # type: ignore[arg-type]
        calibration=noise_images(preprocessing, 1, 0),
        target="cuda",
    )
    gm = fold_constants(compiled.graph_module)
    for batch in batches:
        images = torch.zeros(batch, config.in_chans, config.img_size, config.img_size)
        grouped, alone = Schedule(gm, images), Schedule(gm, images, group=False)
        of = {"model": name, "ssm": ssm, "batch": batch}
        rows: list[Row] = []
        blocks: list[Row] = []
        inside: set[int] = set()
        for part in parts:
            steps = block_steps(gm, grouped, part)
            inside |= {id(step) for step in steps}
            own = {**of, "block": part.name}
            launched = _launches(steps)
            rows += [
                {"kind": "launch", **own, "step": number, **_row(launch)}
                for number, launch in enumerate(launched)
            ]
            blocks.append(
                {
                    "kind": "layer",
                    **own,
                    "launches": len(launched),
                    "launches_alone": len(_launches(block_steps(gm, alone, part))),
                    "calls": _calls(steps),
                    "layers": part.count,
                    **_sum([work_of(launch) for launch in launched]),
                }
            )
        others = [step for step in grouped.steps if id(step) not in inside]
        yield [*rows, *blocks, {"kind": "model", **of, **_model(blocks, _calls(others))}]


def block_steps(gm: fx.GraphModule, schedule: Schedule, part: Part) -> list[Step]:
    """A block's steps: from the first to the last that reads its constants, and what follows
    without reading any (residual additions)."""
    nodes = {node.name: node for node in gm.graph.nodes}
    constants = [
        [one.target for one in nodes[name.split(" + ")[0]].all_input_nodes if one.op == "get_attr"]
        for name in schedule.names
    ]
    own = [
        index
        for index, read in enumerate(constants)
        if any(str(target).startswith(part.prefix) for target in read)
    ]
    stop = own[-1] + 1
    while stop < len(constants) and not constants[stop] and isinstance(schedule.steps[stop], Call):
        stop += 1
    return list(schedule.steps[own[0] : stop])


def _launches(steps: Sequence[Step]) -> list[Launch]:
    return [step for step in steps if isinstance(step, Launch)]


def _calls(steps: Sequence[Step]) -> list[str]:
    return [str(step.function) for step in steps if isinstance(step, Call)]


def _model(blocks: list[Row], others: list[str]) -> Row:
    """All blocks together; other calls are those around them, in stages without kernels once."""

    def total(field: str) -> int:
        return sum(row["layers"] * row[field] for row in blocks)

    return {
        "launches": total("launches"),
        "launches_alone": total("launches_alone"),
        "calls": sum(row["layers"] * len(row["calls"]) for row in blocks),
        "calls_of_the_model": others,
        "layers": sum(row["layers"] for row in blocks),
        "bytes": total("bytes"),
        "estimate_us": {
            name: round(sum(row["layers"] * row["estimate_us"][name] for row in blocks), 2)
            for name in GPUS
        },
    }


def _row(launch: Launch) -> Row:
    work = work_of(launch)
    return {
        "kernel": launch.spec.members[0].label,
        "members": len(launch.spec.members),
        "grid": list(launch.grid),
        "tensors": sum(isinstance(one, Tensor) for one in launch.args),
        **_sum([work]),
    }


def _sum(works: list[Work]) -> Row:
    """Totals, and the estimate of every GPU in microseconds."""
    fields = ("bytes", "int8", "fp32", "exponentials")
    return {
        **{field: sum(getattr(one, field) for one in works) for field in fields},
        "estimate_us": {
            name: round(1e6 * sum(one.seconds(gpu) for one in works), 2)
            for name, gpu in GPUS.items()
        },
    }


def _header() -> str:
    return "  ".join(f"{name:>8s}" for name in GPUS) + "  us, estimate"


def _line(row: Row) -> str:
    times = "  ".join(f"{row['estimate_us'][name]:8.1f}" for name in GPUS)
    block = row.get("block", "all blocks")
    what = f"{row['model']}, {row['ssm']}, {row['batch']}, {block}"
    calls = row["calls"] if isinstance(row["calls"], int) else len(row["calls"])
    return (
        f"{what:54s} {row['layers']:6d} {row['launches']:9d} {row['launches_alone']:6d} "
        f"{calls:6d} {row['bytes'] / 1e6:6.1f}  {times}"
    )
