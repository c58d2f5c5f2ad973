"""Whole models on a CPU: every variant of a model and a batch size, timed in turns."""

from __future__ import annotations

import dataclasses
import gc
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, fx

import ouro_compiler as ouro
from benchmarks import checks, peers
from benchmarks.peers import Model, UnavailableError
from benchmarks.peers_onnx import onnx_runtime
from benchmarks.registry import Row
from benchmarks.timing import Candidate, summary, take_turns
from ouro_compiler.compiler import prepare
from ouro_compiler.config import QuantConfig
from ouro_compiler.data import noise_images
from ouro_compiler.frontend.capture import capture
from ouro_compiler.frontend.detect import ARCHITECTURES
from ouro_compiler.frontend.preprocessing import expected_preprocessing
from ouro_compiler.graph import is_op
from ouro_compiler.runtime.compiled_model import CompiledModel
from ouro_compiler.runtime.cpu_runner import CpuRunner

MAMBA, COMPILED, ONNX = (
    "eager, mamba_ssm reference scan",
    "torch.compile fp32, our scan",
    "ONNX Runtime fp32",
)
BASELINES = {"vs_mamba": MAMBA, "vs_compile": COMPILED, "vs_onnx": ONNX}


class Subject:
    """A model with fixed random weights, its inputs, and what its variants share."""

    def __init__(self, name: str, images: int) -> None:
        torch.manual_seed(0)
        self.name = name
        config = ARCHITECTURES[name]
        self.model = config.build().eval().requires_grad_(False)
        self.preprocessing = expected_preprocessing(config)
        self.calibration = noise_images(self.preprocessing, images, 0)
        self.compiled = cache(self._compile)
        self.expected = cache(self._expected)

    def images(self, batch: int) -> Tensor:
        """Noise, of another seed than the calibration's."""
        return next(iter(noise_images(self.preprocessing, batch, 1).batches(batch)))

    @cached_property
    def graph(self) -> fx.GraphModule:
        """The captured, normalised graph in floating point."""
        module = capture(self.model, self.images(1))
        prepare(module, ouro.W4A4)
        return module

    @property
    def scans(self) -> int:
        """Selective scans of the model."""
        scan = torch.ops.ouro.selective_scan.default
        return sum(is_op(node, scan) for node in self.graph.graph.nodes)

    def _compile(self, config: QuantConfig) -> tuple[CompiledModel, str]:
        example = self.images(1)
        compiled = ouro.compile(self.model, example, config, calibration=self.calibration)
        return compiled, checks.check_operators(compiled.graph_module, example)

    def _expected(self, batch: int) -> Tensor:
        """Logits of the eager model, with mamba_ssm's scan where that is installed."""
        try:
            context: AbstractContextManager[None] = peers.scan_by(peers.mamba_scan())
        except UnavailableError:
            context = nullcontext()
        with torch.inference_mode(), context:
            return self.model(self.images(batch))


@dataclass
class Built:
    """A variant ready to run: images -> logits, how it was made, where its turns run."""

    call: Model
    note: str = ""
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass(frozen=True)
class Variant:
    """A way to run a model. kind: fp32, bf16 or integer, which says how it is checked."""

    kind: str
    build: Callable[[Subject, Tensor], Built]


def _eager(subject: Subject, images: Tensor) -> Built:
    del images
    return Built(subject.model)


def _mamba(subject: Subject, images: Tensor) -> Built:
    del images
    scan = peers.mamba_scan()
    note = "what the others are compared with"
    return Built(subject.model, note, lambda: peers.scan_by(scan))


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
) -> list[Row]:
    """Rows of one model. pattern: a regular expression searched in "MODEL/bBATCH/VARIANT"."""
    rows: list[Row] = []
    subject: Subject | None = None
    for batch in batches:
        chosen = {
            key: one
            for key, one in variants.items()
            if re.search(pattern, f"{name}/b{batch}/{key}")
        }
        if chosen:
            subject = subject or Subject(name, images)
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
                rows[name]["check"] = _check(subject, batch, variant, built)
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


def _check(subject: Subject, batch: int, variant: Variant, built: Built) -> str:
    images, expected = subject.images(batch), subject.expected(batch)
    with built.context():
        found = built.call(images).float().clone()
        if variant.kind == "fp32":
            return checks.check_fp32(found, expected)
        if variant.kind == "bf16":
            return checks.check_bf16(found, expected)
        return checks.check_integer(found, built.call(images).float(), expected)


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


def sentence(error: Exception) -> str:
    """An exception in one line without paths."""
    if isinstance(error, UnavailableError | checks.WrongError):
        return str(error)
    lines = str(error).strip().splitlines() or ["no message"]
    text = re.sub(r"(/[\w.+-]+){2,}", "...", lines[0])
    return f"{type(error).__name__}: {text[:160]}"
