"""Suite "onnx": the digits models as ONNX files, in floating point, W4A4 and W8A8.

Columns: opset, nodes, Scan nodes and integer products of the file, its size, how far ONNX Runtime
is from ours on held-out digits, and milliseconds of one image in both, in turns: the median, and
the fastest in brackets; in floating point ours is the normalised graph. The three trained examples,
and a ViT with random weights. Calibrated on the training images of the examples.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ouro_compiler as ouro
from benchmarks.registry import Row, suite
from benchmarks.timing import Candidate, summary, take_turns
from ouro_compiler.data import open_images
from ouro_compiler.export import export_onnx
from ouro_compiler.export.onnx import runner
from ouro_compiler.frontend.capture import capture
from ouro_compiler.frontend.checkpoint import load_model
from ouro_compiler.frontend.detect import ARCHITECTURES
from ouro_compiler.passes import NORMALIZE
from ouro_compiler.passes.base import PassContext, run_passes

EXAMPLES = Path(__file__).parent.parent / "examples"
DEFAULT = "vim_digits,vmamba_digits,mambavision_digits,vit_micro"
VARIANTS = ("fp32", "w8a8", "w4a4")
CHECKED = 64  # held-out images
_HEAD = (
    "| model | variant | opset | nodes | Scan | MatMulInteger | size | SNR against ours | "
    "same class | onnxruntime | ours |"
)


def _model(name: str) -> nn.Module:
    path = EXAMPLES / f"{name}.safetensors"
    if path.exists():
        module = load_model(path).module
        assert isinstance(module, nn.Module)
        return module
    torch.manual_seed(0)
    return ARCHITECTURES[name].build().eval()


def measure(name: str, variant: str, rounds: int, folder: Path) -> Row:
    """Export one model and compare and time it."""
    module = _model(name)
    preprocessing = load_model(EXAMPLES / "vim_digits.safetensors").preprocessing
    images = next(
        iter(open_images(EXAMPLES / "digits_test.npz", preprocessing, limit=CHECKED).batches(64))
    )
    subject: Any
    if variant == "fp32":
        subject = capture(module, images[:2])
        run_passes(subject, NORMALIZE, PassContext())
    else:
        calibration = open_images(EXAMPLES / "digits_calibration.npz", preprocessing)
        subject = ouro.compile(
            module, images[:2], ouro.PRESETS[variant], calibration=calibration, batch_size=64
        )
    path = folder / f"{name}.{variant}.onnx"
    made = export_onnx(subject, path, images=images)
    theirs = runner(path.read_bytes())
    with torch.no_grad():
        same = (theirs(images).argmax(1) == subject(images).argmax(1)).double().mean()
        candidates = [
            Candidate("onnxruntime", lambda: theirs(images[:1])),
            Candidate("ours", lambda: _run(subject, images[:1])),
        ]
        take_turns(candidates, rounds)
    return {
        "model": name,
        "variant": variant,
        "opset": made.opset,
        "nodes": made.nodes,
        "scans": made.scans,
        "integer_products": made.integer_products,
        "four_bit_weights": made.four_bit_weights,
        "bytes": made.bytes,
        "difference": made.difference,
        "snr_db": made.snr_db,
        "same_class": float(same),
        "threads": torch.get_num_threads(),
        **{one.name: summary(one.seconds) for one in candidates},
    }


def _run(subject: Any, batch: Tensor) -> Tensor:
    return subject(batch)


@suite("onnx")
def onnx(options: argparse.Namespace) -> list[Row]:
    """Every model of --models in every variant; prints a Markdown table."""
    print(f"{_HEAD}\n|{'---|' * _HEAD.count(' | ')}---|")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in (options.models or DEFAULT).split(","):
            for variant in VARIANTS:
                rows.append(measure(name, variant, options.rounds, Path(folder)))
                print(line(rows[-1]), flush=True)
    return rows


def line(row: Row) -> str:
    """A row of the table."""
    times = [
        f"{row[who]['ms']:.2f} ({row[who]['ms_min']:.2f}) ms" for who in ("onnxruntime", "ours")
    ]
    return (
        f"| {row['model']} | {row['variant']} | {row['opset']} | {row['nodes']} | {row['scans']} | "
        f"{row['integer_products']} | {row['bytes'] / 1e3:.0f} kB | {row['snr_db']:.0f} dB | "
        f"{100 * row['same_class']:.1f} % | {times[0]} | {times[1]} |"
    )
