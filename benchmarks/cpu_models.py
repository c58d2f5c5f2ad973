"""Whole models on a CPU: every variant of a model and a batch size, timed in turns."""

from __future__ import annotations

import dataclasses
import gc
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ouro_compiler as ouro
from benchmarks import peers
from benchmarks.peers import Model
from benchmarks.peers_onnx import onnx_runtime
from benchmarks.registry import Row
from benchmarks.subjects import Built, Subject, Variant, check_built, sentence
from benchmarks.timing import Candidate, summary, take_turns
from ouro_compiler.config import QuantConfig
from ouro_compiler.runtime.cpu_runner import CpuRunner

MAMBA, COMPILED, ONNX = (
    "eager, mamba_ssm reference scan",
    "torch.compile fp32, our scan",
    "ONNX Runtime fp32",
)
BASELINES = {"vs_mamba": MAMBA, "vs_compile": COMPILED, "vs_onnx": ONNX}


def _eager(subject: Subject, images: Tensor) -> Built:
    del images
    return Built(subject.model)


def _mamba(subject: Subject, images: Tensor) -> Built:
    del images
    scan = peers.mamba_scan()
    note = "what the others are compared with"
    return Built(subject.model, note, lambda: peers.operators_by({"selective_scan": scan}))


def _peer(make: Callable[[Any, Tensor], Model], note: str) -> Callable[[Subject, Tensor], Built]:
    return lambda subject, images: Built(make(subject.model, images), note)


def _onnx(subject: Subject, images: Tensor) -> Built:
    call = onnx_runtime(subject.model, images, subject.scans)
    return Built(call, f"{subject.scans} Scan nodes")


def _ours_fp32(subject: Subject, images: Tensor) -> Built:
    """The prepared graph on our kernels: as it is, or compiled by Inductor, whichever is faster."""
    plain = CpuRunner(subject.graph)
    compiled = peers.inductor(peers.without_references(subject.graph), images)
    both = [
        Candidate("tape", lambda: plain(images)),
        Candidate("Inductor", lambda: compiled(images)),
    ]
    take_turns(both, 3)
    fast, slow = sorted(both, key=lambda one: summary(one.seconds)["ms"])
    gain = summary(slow.seconds)["ms"] / summary(fast.seconds)["ms"]
    note = f"{fast.name}, {gain:.2f} times as fast as {slow.name}"
    return Built(plain if fast.name == "tape" else compiled, note)


def _ours(config: QuantConfig, ssm: str) -> Callable[[Subject, Tensor], Built]:
    wanted = dataclasses.replace(config, ssm=ssm)  # type: ignore[arg-type]
    return lambda subject, images: Built(*subject.compiled(wanted))


VARIANTS: dict[str, Variant] = {
    MAMBA: Variant("fp32", _mamba),
    "eager, our scan": Variant("fp32", _eager),
    COMPILED: Variant("fp32", _peer(peers.inductor_fp32, "static shapes, freezing")),
    "torch.compile bf16, our scan": Variant(
        "bf16", _peer(peers.inductor_bf16, "static shapes, freezing")
    ),
    ONNX: Variant("fp32", _onnx),
    "torchao int8": Variant("integer", _peer(peers.torchao_int8, "dynamic int8 linears")),
    "X86 Inductor int8": Variant("integer", _peer(peers.inductor_int8, "static int8")),
    "ours fp32": Variant("fp32", _ours_fp32),
    "ours W8A8": Variant("integer", _ours(ouro.W8A8, "params")),
    "ours W4A8": Variant("integer", _ours(ouro.W4A8, "params")),
    "ours W4A4": Variant("integer", _ours(ouro.W4A4, "params")),
    "ours W4A8 ssm none": Variant("integer", _ours(ouro.W4A8, "none")),
    "ours W4A4 ssm none": Variant("integer", _ours(ouro.W4A4, "none")),
}


def measure_model(
    name: str,
    batches: Sequence[int],
    *,
    images: int = 2,
    rounds: int = 9,
    pattern: str = "",
    variants: Mapping[str, Variant] = VARIANTS,
    report: Callable[[Row], None] = lambda row: None,
    artefacts: Path | None = None,
) -> list[Row]:
    """Rows of one model. pattern: a regular expression searched in "MODEL/bBATCH/VARIANT".

    artefacts: a folder to keep compiled models in, and to take them from.
    """
    rows: list[Row] = []
    subject: Subject | None = None
    for batch in batches:
        chosen = {
            key: one
            for key, one in variants.items()
            if re.search(pattern, f"{name}/b{batch}/{key}")
        }
        if chosen:
            subject = subject or Subject(name, images, artefacts=artefacts)
            found = _measure_batch(subject, batch, chosen, rounds)
            for row in found:
                report(row)
            rows += found
        torch._dynamo.reset()
        gc.collect()
    return rows


def _measure_batch(
    subject: Subject, batch: int, variants: Mapping[str, Variant], rounds: int
) -> list[Row]:
    images = subject.images(batch)
    rows: dict[str, Row] = {}
    candidates = []
    with torch.inference_mode(False), torch.no_grad():
        for name, variant in variants.items():
            row = {"kind": "model", "model": subject.name, "batch": batch, "variant": name}
            rows[name] = {**row, "note": None, "check": None, "reason": None}
            start = time.perf_counter()
            try:
                built = variant.build(subject, images)
                rows[name]["note"] = built.note or None
                rows[name]["check"] = check_built(subject, batch, variant, built)
            except Exception as error:  # whatever a peer raises is its row's reason
                rows[name]["reason"] = sentence(error)
                continue
            finally:
                seconds = rows[name]["build_seconds"] = round(time.perf_counter() - start, 1)
                print(f"{subject.name} b{batch}: {name} ready in {seconds} s", file=sys.stderr)
            call = built.call
            candidates.append(
                Candidate(name, lambda call=call: call(images), built.context)  # type: ignore[misc]
            )
        take_turns(candidates, rounds)
    for one in candidates:
        rows[one.name].update(summary(one.seconds))
    return [_with_ratios(row, rows, batch) for row in rows.values()]


def _with_ratios(row: Row, rows: Mapping[str, Row], batch: int) -> Row:
    """With images a second, and how many times as fast as each baseline it is."""
    mine = row.get("ms")
    row["images_per_second"] = None if mine is None else 1e3 * batch / mine
    for key, name in BASELINES.items():
        theirs = rows.get(name, {}).get("ms")
        row[key] = None if mine is None or theirs is None else theirs / mine
    for key in ("ms", "ms_min", "ms_q1", "ms_q3", "ms_max", "calls"):
        row.setdefault(key, None)
    return row
