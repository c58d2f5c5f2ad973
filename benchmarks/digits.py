"""Accuracy and logits SNR of the digits example: every preset, outlier mode and SSM coverage.

    python -m benchmarks.digits [--output benchmarks/results/digits.json]

Calibrated on the 128 training images of examples/digits_calibration.npz, measured on the 1,000
held-out images of examples/digits_test.npz. About ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
from pathlib import Path
from typing import Any

import torch

import ouro_compiler as ouro
from ouro_compiler.data import open_images
from ouro_compiler.frontend.checkpoint import load_model

EXAMPLES = Path(__file__).parent.parent / "examples"


def measure() -> list[dict[str, Any]]:
    """One row for each of the 36 configurations."""
    loaded = load_model(EXAMPLES / "vim_digits.safetensors")
    calibration = open_images(EXAMPLES / "digits_calibration.npz", loaded.preprocessing)
    test = open_images(EXAMPLES / "digits_test.npz", loaded.preprocessing)
    rows = []
    for name in ("w8a8", "w4a8", "w6a6", "w4a4"):
        for ssm in ("none", "params", "full"):
            for outliers in ("none", "static", "dynamic"):
                preset = ouro.PRESETS[name]
                config = dataclasses.replace(
                    preset,
                    ssm=ssm,
                    activations=dataclasses.replace(preset.activations, outliers=outliers),
                )
                compiled = ouro.compile(
                    loaded.module,
                    loaded.example,
                    config,
                    calibration=calibration,
                    verify=test,
                    batch_size=128,
                )
                report = compiled.report
                rows.append(
                    {
                        "preset": name,
                        "ssm": ssm,
                        "outliers": outliers,
                        "accuracy_before": report["accuracy"]["before"],
                        "accuracy_after": report["accuracy"]["after"],
                        "snr_db": report["logits_snr_db"],
                        "outlier_share": report["outlier_share"],
                        "bytes_stored": report["bytes"]["stored"],
                    }
                )
                print(format_row(rows[-1]), flush=True)
    return rows


def format_row(row: dict[str, Any]) -> str:
    """One line of a Markdown table."""
    return (
        f"| {row['preset']} | {row['ssm']} | {row['outliers']} | "
        f"{100 * row['accuracy_before']:.1f} | {100 * row['accuracy_after']:.1f} | "
        f"{row['snr_db']:.2f} | {100 * row['outlier_share']:.2f} |"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="write the rows as JSON")
    args = parser.parse_args()
    print("| preset | ssm | outliers | FP % | quantized % | SNR dB | outliers % |")
    print("|---|---|---|---|---|---|---|")
    rows = measure()
    if args.output is not None:
        machine = f"{platform.machine()}, {torch.get_num_threads()} threads, CPU"
        data = {"torch": torch.__version__, "machine": machine, "rows": rows}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
