"""Suite "models": families with random weights through the whole pipeline, a process each.

Columns: nodes and scans of the captured graph, its largest difference to the eager model as a share
of the largest logit, linears quantized and all, the logits' SNR at W4A4 on noise, seconds, memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import ouro_compiler as ouro
from benchmarks.registry import Row, suite
from ouro_compiler.data import noise_images
from ouro_compiler.frontend.capture import capture
from ouro_compiler.frontend.checkpoint import load_model
from ouro_compiler.frontend.detect import ARCHITECTURES
from ouro_compiler.graph import is_op

DEFAULT = "vim_micro,vim_tiny,vmamba_tiny_s1l8,vmamba_tiny_v0,mambavision_tiny,deit_tiny"
_SCAN = torch.ops.ouro.selective_scan.default


def measure(name: str, images: int) -> Row:
    """Save random weights, open the file by its content, capture, compile, save and load."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        built = ARCHITECTURES[name].build()
        parameters = sum(one.numel() for one in built.parameters())
        save_file(built.state_dict(), path, metadata={"architecture": name})
        del built
        loaded = load_model(path)
        start = time.perf_counter()
        assert isinstance(loaded.module, torch.nn.Module)
        gm = capture(loaded.module, loaded.example)
        captured = time.perf_counter() - start
        with torch.no_grad():
            eager, found = loaded.module(loaded.example), gm(loaded.example)
        difference = float((eager - found).abs().max() / eager.abs().max())
        nodes, scans = len(gm.graph.nodes), sum(is_op(node, _SCAN) for node in gm.graph.nodes)
        del gm
        start = time.perf_counter()
        compiled = ouro.compile(
            loaded.module,
            loaded.example,
            ouro.W4A4,
            calibration=noise_images(loaded.preprocessing, images, 0),
            batch_size=2,
        )
        seconds = time.perf_counter() - start
        compiled.save(Path(folder) / "out.pt2")
        again = ouro.load(Path(folder) / "out.pt2")
        assert torch.equal(again(loaded.example), compiled(loaded.example))
        rows = compiled.report["layers"]["rows"]
    linears = [row for row in rows if row["kind"] == "linear"]
    return {
        "model": name,
        "detected": loaded.name,
        "parameters": parameters,
        "capture_seconds": round(captured, 1),
        "nodes": nodes,
        "scans": scans,
        "difference": difference,
        "linears": len(linears),
        "linears_quantized": sum(row["status"] == "quantized" for row in linears),
        "snr_db": round(compiled.report["logits_snr_db"], 2),
        "bytes": compiled.report["bytes"],
        "compile_seconds": round(seconds, 1),
    }


@suite("models")
def models(options: argparse.Namespace) -> list[Row]:
    """Every model of --models in a process of its own; prints a Markdown table."""
    print(
        "| model | parameters | nodes | scans | linears quantized | capture - eager | "
        "W4A4 logits SNR | fp16 -> stored | compile | memory |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    rows = []
    for name in (options.models or DEFAULT).split(","):
        command = [sys.executable, "-m", "benchmarks.models", name, str(options.images)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        if status != 0:
            raise SystemExit(f"{name} failed")
        row = {**json.loads(output), "peak_megabytes": usage.ru_maxrss // 1024}
        rows.append(row)
        print(_line(row), flush=True)
    return rows


def _line(row: dict[str, Any]) -> str:
    size = row["bytes"]
    return (
        f"| {row['model']} | {row['parameters'] / 1e6:.1f} M | {row['nodes']} | {row['scans']} | "
        f"{row['linears_quantized']} of {row['linears']} | {row['difference']:.0e} | "
        f"{row['snr_db']:.1f} dB | {size['fp16'] / 1e6:.1f} -> {size['stored'] / 1e6:.1f} MB | "
        f"{row['compile_seconds']:.0f} s | {row['peak_megabytes'] / 1024:.1f} GB |"
    )


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
