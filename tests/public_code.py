"""What is asked of public code: captured, equal to itself, quantized, saved and loaded."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import ouro_compiler as ouro
from ouro_compiler.frontend.capture import batch_dimension_is_dynamic, capture


@dataclasses.dataclass(frozen=True, kw_only=True)
class Findings:
    """nodes and scans of the captured graph; difference to eager, relative to its largest logit;
    linears quantized and in all; SNR of the logits at W4A4 in dB; seconds to compile; the largest
    difference of the loaded artefact to the compiled model, and between batch sizes."""

    nodes: int
    scans: int
    dynamic: bool
    difference: float
    quantized: int
    linears: int
    floating: list[str]
    snr_db: float
    compile_seconds: float
    reload_difference: float


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights that make every layer count: public code often starts with tiny or zero ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and not name.endswith(("A_log", "A_b_log", "A_logs")):
                fan_in = parameter[0].numel()
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise / fan_in**0.5)
    return model.eval().requires_grad_(False)


def examine(model: nn.Module, images: Tensor, eager: Tensor) -> Findings:
    """Take a model through the compiler. eager: its own logits for the images, computed before."""
    gm = capture(model, images[:1])
    difference = (gm(images) - eager).abs().max() / eager.abs().max()
    start = time.perf_counter()
    compiled = ouro.compile(model, images[:1], ouro.W4A4, calibration=images)
    seconds = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt2"
        compiled.save(path)
        loaded = ouro.load(path)
        reload_difference = (loaded(images[:3]) - compiled(images)[:3]).abs().max()
    rows = [row for row in compiled.report["layers"]["rows"] if row["kind"] == "linear"]
    scan = torch.ops.ouro.selective_scan.default
    return Findings(
        nodes=len(gm.graph.nodes),
        scans=sum(node.target is scan for node in gm.graph.nodes),
        dynamic=batch_dimension_is_dynamic(gm),
        difference=float(difference),
        quantized=sum(row["status"] == "quantized" for row in rows),
        linears=len(rows),
        floating=[f"{row['name']}: {row['reason']}" for row in rows if row["status"] == "skipped"],
        snr_db=compiled.report["logits_snr_db"],
        compile_seconds=round(seconds, 1),
        reload_difference=float(reload_difference),
    )
