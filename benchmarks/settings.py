"""Suite "settings": what 16-bit activations and quantized heads cost on the digits models.

    python -m benchmarks.run --suite settings [--models vim,vmamba] [--json FILE]

Accuracy and SNR of the logits on the 1,000 held-out images of examples/digits_test.npz, calibrated
on the 128 images of examples/digits_calibration.npz. On a CPU: its kernels compute in fp32 and
round where a GPU's do, so that accuracy and SNR are those of a GPU but for last bits.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import ouro_compiler as ouro
from benchmarks.registry import Row, suite
from ouro_compiler.data import open_images
from ouro_compiler.frontend.checkpoint import load_model

EXAMPLES = Path(__file__).parent.parent / "examples"
MODELS = "vim,vmamba,mambavision,vit"
PRESETS = ("w4a4", "w8a8")
SETTINGS = (
    "activation_dtype=fp32",
    "activation_dtype=fp16",
    "activation_dtype=bf16",
    "head_bits=4",
)


@suite("settings")
def settings(options: argparse.Namespace) -> list[Row]:
    """A row for every model, preset and setting; prints a Markdown table as it goes."""
    rows: list[Row] = []
    print("| model | preset | setting | FP % | quantized % | SNR dB | kB |")
    print("|---|---|---|---|---|---|---|")
    for model in (options.models or MODELS).split(","):
        loaded = load_model(EXAMPLES / f"{model}_digits.safetensors")
        calibration, test = (
            open_images(EXAMPLES / f"digits_{part}.npz", loaded.preprocessing)
            for part in ("calibration", "test")
        )
        for preset in PRESETS:
            for setting in SETTINGS:
                compiled = ouro.compile(
                    *(loaded.module, loaded.example, ouro.PRESETS[preset].with_setting(setting)),
                    calibration=calibration,
                    verify=test,
                    batch_size=128,
                )
                report = compiled.report
                rows.append(
                    {
                        "model": model,
                        "preset": preset,
                        "setting": setting,
                        "accuracy_before": report["accuracy"]["before"],
                        "accuracy_after": report["accuracy"]["after"],
                        "snr_db": report["logits_snr_db"],
                        "bytes_stored": report["bytes"]["stored"],
                        "notes": [one for one in report["notes"] if "products give" in one],
                    }
                )
                print(_line(rows[-1]), flush=True)
    return rows


def _line(row: Row) -> str:
    return (
        f"| {row['model']} | {row['preset']} | {row['setting']} | "
        f"{100 * row['accuracy_before']:.1f} | {100 * row['accuracy_after']:.1f} | "
        f"{row['snr_db']:.2f} | {row['bytes_stored'] / 1000:.1f} |"
    )
