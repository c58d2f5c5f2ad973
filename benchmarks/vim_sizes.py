"""Bytes, wall time and peak memory of `ouro-compile --w4a4` on Vim-T / S / B with random weights.

    python -m benchmarks.vim_sizes [--sizes tiny small base] [--images 8] [--head-bits 4]
        [--output FILE.json]

Calibrated on noise: bytes do not depend on it. Each model is compiled in a process of its own.
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

from ouro_compiler.models.vim import ARCHITECTURES


def measure(size: str, images: int, head_bits: int | None) -> dict[str, Any]:
    """Compile one model; bytes from its report, seconds and megabytes of the whole process."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        model = ARCHITECTURES[f"vim_{size}"].build()
        save_file(model.state_dict(), place / "model.safetensors")
        command = [sys.executable, "-m", "ouro_compiler", "compile", "model.safetensors", "--w4a4"]
        command += ["--calibration", "noise", "--images", str(images), "--batch-size", "8"]
        command += ["--set", f"head_bits={head_bits or 'none'}"]
        command += ["-q", "-o", "out.pt2", "--report", "report.json"]
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=place)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        if status != 0:
            raise SystemExit(f"ouro-compile failed on vim_{size}")
        report = json.loads((place / "report.json").read_text())
        return {
            "model": f"vim_{size}",
            "images": images,
            "head_bits": head_bits,
            "bytes": report["bytes"],
            "file_bytes": (place / "out.pt2").stat().st_size,
            "seconds": round(seconds, 1),
            "seconds_by_stage": report["seconds"],
            "peak_megabytes": usage.ru_maxrss // 1024,
        }


def print_rows(rows: list[dict[str, Any]]) -> None:
    """Markdown tables: bytes by part, then time and memory."""
    print("| part (MB, fp16 -> stored) | " + " | ".join(row["model"] for row in rows) + " |")
    print("|---|" + "---|" * len(rows))
    for part in rows[0]["bytes"]["by_part"]:
        cells = [row["bytes"]["by_part"][part] for row in rows]
        shown = [f"{one['fp16'] / 1e6:.2f} -> {one['stored'] / 1e6:.2f}" for one in cells]
        print(f"| {part} | " + " | ".join(shown) + " |")
    totals = []
    for row in rows:
        before, after = row["bytes"]["fp16"], row["bytes"]["stored"]
        totals.append(f"{before / 1e6:.2f} -> {after / 1e6:.2f} ({before / after:.2f}x)")
    print("| all | " + " | ".join(totals) + " |")
    print("| file | " + " | ".join(f"{row['file_bytes'] / 1e6:.2f}" for row in rows) + " |")
    for row in rows:
        print(
            f"{row['model']}, {row['images']} noise images: {row['seconds']} s, "
            f"peak memory {row['peak_megabytes']} MB"
        )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=["tiny", "small", "base"])
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--head-bits", type=int, help="of the weights of heads")
    parser.add_argument("--output", type=Path, help="write the rows as JSON")
    args = parser.parse_args()
    rows = [measure(size, args.images, args.head_bits) for size in args.sizes]
    print_rows(rows)
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
