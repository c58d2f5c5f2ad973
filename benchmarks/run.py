"""python -m benchmarks.run --suite NAME [--json FILE] and the options of that suite"""

from __future__ import annotations

import argparse
from pathlib import Path

import benchmarks.accuracy
import benchmarks.cpu
import benchmarks.fidelity
import benchmarks.gpu
import benchmarks.launches
import benchmarks.models
import benchmarks.offline
import benchmarks.onnx_export
import benchmarks.settings
import benchmarks.synthesis
import benchmarks.training  # noqa: F401  (they register their suites)
from benchmarks.output import write_rows
from benchmarks.registry import SUITES


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--suite", required=True, choices=sorted(SUITES))
    parser.add_argument("--arch", default="sm_80,sm_89,sm_90", help="architectures (offline)")
    parser.add_argument("--models", help="with commas; what they are depends on the suite")
    parser.add_argument(
        "--images", type=int, default=2, help="calibration images (models, cpu, gpu)"
    )
    parser.add_argument("--steps", type=int, default=60, help="steps a case (training)")
    parser.add_argument("--seeds", default="0,1,2", help="with commas (synthesis, accuracy)")
    parser.add_argument("--workers", type=int, default=1, help="models at a time (accuracy)")
    parser.add_argument("--filter", help="a regular expression that rows' names match")
    parser.add_argument("--batches", help="batch sizes, with commas (cpu, gpu, launches)")
    parser.add_argument(
        "--rounds", type=int, default=9, help="turns of every variant (cpu, gpu, onnx)"
    )
    parser.add_argument(
        "--artefacts", type=Path, help="keep compiled models in a folder (cpu, gpu)"
    )
    parser.add_argument(
        "--tune", type=float, metavar="SECONDS", help="tune first, each model and preset (gpu)"
    )
    parser.add_argument("--json", type=Path, help="write the rows, with what they were made with")
    given = parser.parse_args()
    if given.workers < 1:
        parser.error("--workers must be at least 1")
    rows = SUITES[given.suite](given)
    if given.json is not None:
        write_rows(given.json, given.suite, rows)


if __name__ == "__main__":
    main()
