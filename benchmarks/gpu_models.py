"""Whole models on a GPU: every variant of a model and a batch size, a row as soon as it is there.

Variants are measured one after the other: a run may be cut off at any time.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from itertools import groupby, product
from pathlib import Path

import torch
from torch import Tensor

import ouro_compiler as ouro
from benchmarks import checks, peers
from benchmarks.gpu_probe import Probe, bytes_of
from benchmarks.peers import UnavailableError
from benchmarks.peers_cuda import cuda_kernels
from benchmarks.registry import Row
from benchmarks.resume import Rows
from benchmarks.subjects import Built, Subject, Variant, check_built, sentence
from benchmarks.timing import Candidate, summary, take_turns
from ouro_compiler.config import QuantConfig
from ouro_compiler.runtime.compiled_model import runner_of
from ouro_compiler.runtime.cuda_graphs import CudaGraphs

HALF = torch.float16
Build = Callable[[Subject, Tensor], Built]


def _eager(subject: Subject, images: Tensor) -> Built:
    del images
    model = subject.placed(HALF)
    return Built(lambda given: model(given.half()), module=model)


def _packages(subject: Subject, images: Tensor) -> Built:
    kernels, device = cuda_kernels(), subject.device.type
    built = _eager(subject, images)
    return dataclasses.replace(built, context=lambda: peers.operators_by(kernels, device))


def _captured(build: Build) -> Build:
    """The same in a CUDA graph."""

    def make(subject: Subject, images: Tensor) -> Built:
        if subject.device.type != "cuda":
            raise UnavailableError("CUDA graphs need a GPU")
        built = build(subject, images)
        with built.context():
            replay = CudaGraphs(subject.device).capture(built.call, images)
        return dataclasses.replace(built, call=replay, context=nullcontext)

    return make


def _inductor(subject: Subject, images: Tensor) -> Built:
    model = subject.placed(HALF)
    compiled = peers.inductor_max_autotune(model, images.half())
    return Built(lambda given: compiled(given.half()), "static shapes", module=model)


def _ours_half(subject: Subject, images: Tensor) -> Built:
    """The prepared graph, unquantized, as a compiled model runs it."""
    graph = copy.deepcopy(subject.prepared(HALF)).to(subject.device)
    note = checks.check_operators(graph, images[:1].half())
    runner = runner_of(graph)
    return Built(lambda given: runner(given.half()), note, module=graph)


def _ours(config: QuantConfig) -> Build:
    def make(subject: Subject, images: Tensor) -> Built:
        del images
        compiled, note = subject.compiled(config)
        if subject.device.type == "cpu":
            return Built(compiled, note, module=compiled.graph_module)
        here = copy.deepcopy(compiled).to(subject.device)
        return Built(here, note, module=here.graph_module, on_cpu=compiled)

    return make


PRESETS = {
    f"ours {name}": dataclasses.replace(config, ssm="params")
    for name, config in (("W8A8", ouro.W8A8), ("W4A8", ouro.W4A8), ("W4A4", ouro.W4A4))
}
EAGER, PACKAGES = "eager fp16, our scan", "eager fp16, mamba_ssm and causal_conv1d kernels"
COMPILED = "torch.compile max-autotune fp16, our scan"
VARIANTS: dict[str, Variant] = {
    EAGER: Variant("fp16", _eager),
    PACKAGES: Variant("fp16", _packages),
    f"{EAGER}, CUDA graph": Variant("fp16", _captured(_eager)),
    f"{PACKAGES}, CUDA graph": Variant("fp16", _captured(_packages)),
    COMPILED: Variant("fp16", _inductor),
    "ours fp16": Variant("fp16", _ours_half),
    **{name: Variant("integer", _ours(config)) for name, config in PRESETS.items()},
}
TUNED = ", tuned"  # behind a variant's name: its kernels run with what tuning found
_MADE_AFTER = 4  # calls: compilers and runners make their CUDA graphs at the second or third
_NUMBERS = (
    *("ms", "ms_min", "ms_q1", "ms_q3", "ms_max", "calls", "images_per_second"),
    *("peak_bytes", "weights_bytes", "launches"),
)


def row_name(model: str, batch: int, variant: str) -> str:
    """What --filter is searched in."""
    return f"gpu/{model}/b{batch}/{variant}"


def measure_models(
    rows: Rows,
    models: Sequence[str],
    batches: Sequence[int],
    *,
    images: int,
    rounds: int,
    device: str = "cuda",
    variants: Mapping[str, Variant] = VARIANTS,
    artefacts: Path | None = None,
) -> None:
    """Add the rows that are wanted and not there; those that failed in earlier runs come last."""
    new, failed = [], []
    for name in models:
        for batch, key in product(batches, variants):
            row = row_name(name, batch, key)
            if rows.wants(row, None):
                (failed if rows.failed(row, None) else new).append((name, batch, key))
    for name, wanted in groupby(new + failed, key=lambda one: one[0]):
        subject = Subject(name, images, device, artefacts)
        for _, batch, key in wanted:
            rows.add(measure_variant(subject, batch, key, variants[key], rounds))
            Probe(subject.device).require_usable(row_name(name, batch, key))
            torch._dynamo.reset()
            gc.collect()


def measure_variant(subject: Subject, batch: int, key: str, variant: Variant, rounds: int) -> Row:
    """A row with numbers, or with the reason why there are none."""
    name = row_name(subject.name, batch, key)
    row: Row = {"row": name, "seed": None, "kind": "model", "model": subject.name, "batch": batch}
    row |= {"variant": key, "note": None, "check": None, "reason": None}
    ours = key.startswith("ours")
    row["blocks"] = ("tuned" if key.endswith(TUNED) else "default") if ours else None
    row |= dict.fromkeys(_NUMBERS)
    start = time.perf_counter()
    try:
        with torch.inference_mode(False), torch.no_grad():
            row |= _numbers(subject, batch, variant, rounds)
    except Exception as error:  # whatever a variant raises is its row's reason
        row["reason"] = sentence(error)
    row["seconds"] = round(time.perf_counter() - start, 1)
    print(f"{name}: {row['seconds']} s", file=sys.stderr)
    return row


def _numbers(subject: Subject, batch: int, variant: Variant, rounds: int) -> Row:
    probe, images = Probe(subject.device), subject.images(batch)
    subject.expected(batch)
    before = probe.held()
    built = variant.build(subject, images)
    check = check_built(subject, batch, variant, built)
    candidate = Candidate("", lambda: built.call(images), built.context)
    with built.context():
        for _ in range(_MADE_AFTER):
            candidate.call()
        held = probe.held() - before
        transient = probe.transient(candidate.call)
        launches, uncounted = _launches(probe, candidate)
    take_turns([candidate], rounds, probe.clock)
    times = summary(candidate.seconds)
    return {
        **times,
        "note": "; ".join(one for one in (built.note, uncounted) if one) or None,
        "check": check,
        "images_per_second": 1e3 * batch / times["ms"],
        "peak_bytes": None if transient is None else held + transient,
        "weights_bytes": None if built.module is None else bytes_of(built.module),
        "launches": launches,
    }


def _launches(probe: Probe, candidate: Candidate) -> tuple[int | None, str]:
    """Kernels of a call, or the reason why they could not be counted."""
    try:
        return probe.launches(candidate.call), ""
    except Exception as error:  # a profiler that does not work here takes no other number away
        return None, f"kernels not counted ({sentence(error)})"
