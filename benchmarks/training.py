"""Suite "training": what gradients cost on this CPU, with the references and with the kernels.

Rows: a scan, and the scan and the convolution of the digits example; a step of the example's
training (examples/train_digits.py, 64 images). The references and the kernels take turns, a process
each; the smallest time counts.

    python -m benchmarks.run --suite training [--steps 60] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

import ouro_compiler.ops
from benchmarks.registry import Row, suite
from ouro_compiler.models.vim import vim_micro

TURNS = 2


def scan_step(
    batch: int, length: int, channels: int, states: int, gated: bool
) -> Callable[[], object]:
    """Forward and backward of a scan with softplus and D; token-major, as in the models."""

    def tokens(width: int) -> Tensor:
        return torch.randn(batch, length, width).transpose(1, 2).requires_grad_()

    u, delta, B, C = (tokens(width) for width in (channels, channels, states, states))
    z = tokens(channels) if gated else None
    A = (-torch.rand(channels, states)).requires_grad_()
    D, bias = (torch.randn(channels, requires_grad=True) for _ in range(2))
    grad = torch.randn(batch, length, channels).transpose(1, 2)
    inputs = [x for x in (u, delta, A, B, C, D, z, bias) if x is not None]

    def step() -> object:
        y = torch.ops.ouro.selective_scan(u, delta, A, B, C, D, z, bias, True, False)
        return torch.autograd.grad(y, inputs, grad)

    return step


def conv_step(batch: int, length: int, channels: int, taps: int) -> Callable[[], object]:
    """Forward and backward of a causal convolution with SiLU."""
    x = torch.randn(batch, length, channels).transpose(1, 2).requires_grad_()
    weight = torch.randn(channels, taps, requires_grad=True)
    bias = torch.randn(channels, requires_grad=True)
    grad = torch.randn(batch, length, channels).transpose(1, 2)

    def step() -> object:
        y = torch.ops.ouro.causal_conv1d(x, weight, bias, True, False)
        return torch.autograd.grad(y, (x, weight, bias), grad)

    return step


def training_step() -> Callable[[], object]:
    """A step of examples/train_digits.py on noise, without augmentation and averaging."""
    images, labels = torch.randn(64, 1, 28, 28), torch.arange(64) % 10
    model = vim_micro()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)

    def step() -> object:
        loss = torch.nn.functional.cross_entropy(model(images), labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        return optimizer.step()

    return step


CASES: dict[str, tuple[Callable[[], Callable[[], object]], int]] = {
    "scan (8, 128, 65), N = 16": (lambda: scan_step(8, 65, 128, 16, False), 4),
    "scan (64, 96, 50), N = 16, gate": (lambda: scan_step(64, 50, 96, 16, True), 1),
    "convolution (64, 96, 50), 4 taps": (lambda: conv_step(64, 50, 96, 4), 4),
    "training step, vim_micro, 64 images": (training_step, 1),
}


def measure(steps: int) -> dict[str, dict[str, float]]:
    """Seconds of every case, smallest and median; a case runs `steps` times its weight."""
    torch.manual_seed(0)
    found = {}
    for name, (make, weight) in CASES.items():
        step, seconds = make(), []
        step()  # compiles
        for _ in range(steps * weight):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
        seconds.sort()
        found[name] = {"smallest": seconds[0], "median": seconds[len(seconds) // 2]}
    return found


@suite("training")
def training(options: argparse.Namespace) -> list[Row]:
    """A row a case; prints a Markdown table of milliseconds."""
    runs: dict[str, list[dict[str, dict[str, float]]]] = {"reference": [], "kernels": []}
    for _ in range(TURNS):
        for kind, found in runs.items():
            command = [sys.executable, "-m", "benchmarks.training", kind]
            steps = str(max(1, options.steps // TURNS))
            output = subprocess.run(
                [*command, steps], check=True, stdout=subprocess.PIPE, text=True
            )
            found.append(json.loads(output.stdout))
    print("| forward and backward, ms | reference | kernels | ratio | medians |")
    print("|---|---|---|---|---|")
    rows = []
    for name in CASES:
        row: Row = {"case": name, "threads": torch.get_num_threads()}
        for kind, found in runs.items():
            for number in ("smallest", "median"):
                row[f"{kind}_{number}"] = round(min(one[name][number] for one in found), 6)
        rows.append(row)
        print(_line(row), flush=True)
    return rows


def _line(row: Row) -> str:
    before, after = 1e3 * row["reference_smallest"], 1e3 * row["kernels_smallest"]
    medians = f"{1e3 * row['reference_median']:.2f}, {1e3 * row['kernels_median']:.2f}"
    return f"| {row['case']} | {before:.2f} | {after:.2f} | {before / after:.1f} | {medians} |"


if __name__ == "__main__":
    if sys.argv[1] == "kernels":
        import ouro_compiler.kernels.cpu  # noqa: F401  (registers the kernels)
    assert ("ouro_compiler.kernels.cpu" in sys.modules) == (sys.argv[1] == "kernels")
    print(json.dumps(measure(int(sys.argv[2]))))
