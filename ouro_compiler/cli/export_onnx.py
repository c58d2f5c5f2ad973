"""`ouro export-onnx`: an artefact, or a model in floating point, as an ONNX file."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ouro_compiler.cli.console import human_bytes, print_table
from ouro_compiler.cli.source import ModelSource
from ouro_compiler.errors import UsageError

if TYPE_CHECKING:
    from ouro_compiler.export import Exported


def run(
    source: ModelSource,
    *,
    output: Path,
    opset: int,
    scan: Literal["scan", "contrib"],
    verify: bool,
    quiet: bool,
) -> None:
    """Do what the command says. Raises OuroError subclasses; the file appears when it is valid."""
    from ouro_compiler.export import check_options, export_onnx

    if output.is_dir() or not output.absolute().parent.is_dir():
        raise UsageError(f"--output {output}: not a file in an existing folder")
    check_options(opset, scan, verify)
    # torch.export explains at length what our own sentence says in one line.
    logging.getLogger("torch.fx.experimental.symbolic_shapes").setLevel(logging.ERROR)
    made = export_onnx(_open(source), output, opset=opset, scan=scan, verify=verify)
    if not quiet:
        _print_result(made, output, scan)


def _open(source: ModelSource) -> Any:
    """A compiled model, or the normalised graph of one in floating point."""
    from ouro_compiler.runtime.artifact import is_artifact, load

    if is_artifact(source.name):
        if source != ModelSource(name=source.name):
            raise UsageError(
                "--arch, --ema, --model-arg, --checkpoint, --input-shape and --allow-pickle are "
                f"for models, and {source.name} is compiled already"
            )
        return load(source.name)
    from ouro_compiler.frontend.capture import capture
    from ouro_compiler.passes import NORMALIZE
    from ouro_compiler.passes.base import PassContext, run_passes

    loaded = source.load()
    gm = capture(loaded.module, loaded.example)
    run_passes(gm, NORMALIZE, PassContext())
    return gm


def _print_result(made: Exported, output: Path, scan: str) -> None:
    from rich.table import Table

    table = Table(show_header=False)
    table.add_row("size", human_bytes(made.bytes))
    table.add_row("nodes", f"{made.nodes}, opset {made.opset}")
    form = "Scan" if scan == "scan" else "com.microsoft.LinearAttention"
    table.add_row("selective scans", f"{made.scans} as {form}")
    if made.integer_products:
        table.add_row("integer products", f"{made.integer_products} as MatMulInteger")
        table.add_row("4-bit initializers", str(made.four_bit_weights))
    if made.difference is None or made.snr_db is None:
        table.add_row("onnxruntime", "not compared (--no-verify)")
    else:
        snr = "no difference" if math.isinf(made.snr_db) else f"SNR {made.snr_db:.1f} dB"
        largest = f"largest difference {made.difference:.1e} of the largest output"
        table.add_row("onnxruntime against ours", f"{snr}, {largest}")
    print_table(table)
    print(output)
