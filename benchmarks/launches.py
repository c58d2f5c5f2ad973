"""Suite "launches": what one layer of a Vim launches on a GPU, and roofline estimates of it.

    python -m benchmarks.run --suite launches [--models vim_tiny,vim_small] [--batches 1,32]

Random weights, W4A4. A layer is the last one of a model of two: from its norm to the last norm.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

import ouro_compiler as ouro
from benchmarks.registry import Row, suite
from benchmarks.roofline import GPUS, Work, work_of
from ouro_compiler.data import noise_images
from ouro_compiler.errors import UsageError
from ouro_compiler.frontend.preprocessing import expected_preprocessing
from ouro_compiler.kernels.launch import Launch
from ouro_compiler.kernels.spec import Template
from ouro_compiler.models import vim
from ouro_compiler.runtime.folding import fold_constants
from ouro_compiler.runtime.schedule import Schedule

DEFAULT = "vim_tiny,vim_small,vim_base"
BATCHES = "1,32"
_COVERAGES = ("none", "params")


@suite("launches")
def launches(options: argparse.Namespace) -> list[Row]:
    """Rows of every launch of a layer, and of the layer; prints the layers."""
    names = (options.models or DEFAULT).split(",")
    unknown = [name for name in names if name not in vim.ARCHITECTURES]
    if unknown:
        raise UsageError(
            f"{unknown[0]} has no layers that are counted: choose of {', '.join(vim.ARCHITECTURES)}"
        )
    batches = [int(one) for one in (options.batches or BATCHES).split(",")]
    rows: list[Row] = []
    print("model, ssm           batch  launches  alone  calls  MB    " + _header())
    for name in names:
        for ssm in _COVERAGES:
            for found in measure(name, ssm, batches):
                rows += found
                print(_line(found[-1]), flush=True)
    return rows


def measure(name: str, ssm: str, batches: list[int]) -> Iterator[list[Row]]:
    """For each batch size the rows of a layer's launches, and last the layer's own."""
    config = vim.ARCHITECTURES[name]
    torch.manual_seed(0)
    model = dataclasses.replace(config, depth=2).build().eval().requires_grad_(False)
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
        rows = [
            {"kind": "launch", **of, "step": number, **_row(launch)}
            for number, launch in enumerate(last_layer(grouped))
        ]
        works = [work_of(launch) for launch in last_layer(grouped)]
        yield [
            *rows,
            {
                "kind": "layer",
                **of,
                "launches": len(rows),
                "launches_alone": len(last_layer(alone)),
                "calls_of_the_model": [
                    str(step.function) for step in grouped.steps if not isinstance(step, Launch)
                ],
                "layers": config.depth,
                **_sum(works),
            },
        ]


def last_layer(schedule: Schedule) -> list[Launch]:
    """The launches from the last fused norm to the norm behind the layers."""
    steps = schedule.steps
    norms = [
        index
        for index, step in enumerate(steps)
        if isinstance(step, Launch) and step.spec.template is Template.ADD_NORM_QUANTIZE
    ]
    found: list[Launch] = []
    for step in steps[norms[-1] :]:
        if not isinstance(step, Launch) or step.spec.template is Template.ADD_NORM:
            break
        found.append(step)
    return found


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
    return "  ".join(f"{name:>8s}" for name in GPUS) + "  us a layer, estimate"


def _line(row: Row) -> str:
    times = "  ".join(f"{row['estimate_us'][name]:8.1f}" for name in GPUS)
    return (
        f"{row['model']:12s} {row['ssm']:7s} {row['batch']:5d} {row['launches']:9d} "
        f"{row['launches_alone']:6d} {len(row['calls_of_the_model']):6d}  "
        f"{row['bytes'] / 1e6:5.1f} {times}"
    )
