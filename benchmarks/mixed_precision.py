"""Size against SNR and accuracy of the digits example, at several budgets, and with learned scales.

    python -m benchmarks.mixed_precision [--preset w4a4] [--budgets 0.09 0.1 0.115 0.14] [--refine]

Calibrated on the 128 training images of examples/digits_calibration.npz, measured on the 1,000
held-out images of examples/digits_test.npz. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections import Counter

import ouro_compiler as ouro
from benchmarks.digits import EXAMPLES
from ouro_compiler.config import MixedSpec, RefineSpec
from ouro_compiler.data import open_images
from ouro_compiler.frontend.checkpoint import load_model


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", choices=sorted(ouro.PRESETS), default="w4a4")
    parser.add_argument("--model", default="vim_digits")
    parser.add_argument("--budgets", type=float, nargs="*", default=[0.09, 0.1, 0.115, 0.14])
    parser.add_argument("--refine", action="store_true", help="learn scales as well")
    args = parser.parse_args()
    loaded = load_model(EXAMPLES / f"{args.model}.safetensors")
    calibration = open_images(EXAMPLES / "digits_calibration.npz", loaded.preprocessing)
    test = open_images(EXAMPLES / "digits_test.npz", loaded.preprocessing)
    config = ouro.PRESETS[args.preset]
    if args.refine:
        config = dataclasses.replace(config, refine=RefineSpec())
    print("| budget (kB) | kB | SNR (dB) | accuracy (%) | layers by weight bits | search (s) |")
    print("|---|---|---|---|---|---|", flush=True)
    for budget in (None, *args.budgets):
        compiled = ouro.compile(
            loaded.module,
            loaded.example,
            config,
            calibration=calibration,
            verify=test,
            mixed=None if budget is None else MixedSpec(budget_mb=budget),
            batch_size=125,
        )
        report = compiled.report
        rows = [row for row in report["layers"]["rows"] if row["status"] != "skipped"]
        bits = Counter(row["weight_bits"] for row in rows)
        print(
            f"| {'-' if budget is None else f'{1e3 * budget:g}'} "
            f"| {report['bytes']['stored'] / 1e3:.1f} | {report['logits_snr_db']:.2f} "
            f"| {100 * report['accuracy']['after']:.1f} "
            f"| {', '.join(f'{bits[one]} at {one}' for one in sorted(bits))} "
            f"| {compiled.seconds.get('mixed precision', 0.0):.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
