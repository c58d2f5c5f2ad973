"""The command line: `ouro-compile MODEL --w4a4 ...` and `ouro {compile, inspect}`.

Progress goes to stderr, results to stdout. Exit codes are those of `ouro_compiler.errors`.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ouro_compiler.errors import OuroError, UsageError

EXIT_CODES = """\b
Exit codes: 0 done; 2 usage or data; 3 the model is missing, unreadable or cannot be traced;
4 a selected layer was refused under --strict; 5 verification failed; 6 the device is missing."""


class Ssm(str, Enum):
    """--ssm"""

    none = "none"
    params = "params"


class Outliers(str, Enum):
    """--outliers"""

    none = "none"
    static = "static"
    dynamic = "dynamic"


class TargetName(str, Enum):
    """--target"""

    cpu = "cpu"
    cuda = "cuda"


class Format(str, Enum):
    """--format"""

    text = "text"
    json = "json"
    dot = "dot"
    graphml = "graphml"


def compile_command(
    model: Annotated[
        Path, typer.Argument(help="Vim state_dict (.pth, .pt, .safetensors) or torch.export .pt2")
    ],
    w4a4: Annotated[bool, typer.Option("--w4a4", help="4-bit weights and activations")] = False,
    w4a8: Annotated[bool, typer.Option("--w4a8", help="4-bit weights, 8-bit activations")] = False,
    w6a6: Annotated[bool, typer.Option("--w6a6", help="6-bit weights and activations")] = False,
    w8a8: Annotated[bool, typer.Option("--w8a8", help="8-bit weights and activations")] = False,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="artefact to write (MODEL.PRESET.pt2)")
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(help="folder of images, .npz or .safetensors of arrays, or 'noise'"),
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="calibration images at most")] = 128,
    ssm: Annotated[Ssm, typer.Option(help="operands of the scans to quantize")] = Ssm.params,
    outliers: Annotated[Outliers, typer.Option(help="how outliers are found")] = Outliers.dynamic,
    target: Annotated[TargetName, typer.Option(help="device it will run on")] = TargetName.cpu,
    arch: Annotated[
        str | None, typer.Option(help="architecture, where the weights cannot tell")
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option(help="layers to quantize, as patterns (all)")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="layers to leave alone, as patterns")
    ] = None,
    verify: Annotated[
        str | None, typer.Option(help="labelled images to measure accuracy on")
    ] = None,
    max_drop: Annotated[
        float | None, typer.Option(min=0.0, help="accuracy points that may be lost (exit 5)")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="say what would be quantized, write nothing")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="fail if a selected layer is refused (exit 4)")
    ] = False,
    report: Annotated[Path | None, typer.Option(help="write the report as JSON")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="images at a time")] = 32,
    seed: Annotated[int, typer.Option(help="of noise and of choosing images")] = 0,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="unpickle MODEL: it can run any code")
    ] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="print errors only")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="log every pass")] = False,
) -> None:
    """Compile MODEL into a quantized artefact."""
    from ouro_compiler.cli.compile import CompileRequest, run

    chosen = [
        name for name, on in (("w4a4", w4a4), ("w4a8", w4a8), ("w6a6", w6a6), ("w8a8", w8a8)) if on
    ]
    if len(chosen) > 1:
        raise UsageError(f"choose one of --{' and --'.join(chosen)}")
    if quiet and verbose:
        raise UsageError("choose one of --quiet and --verbose")
    _log_passes(verbose)
    run(
        CompileRequest(
            model=model,
            preset=chosen[0] if chosen else "w4a4",
            output=output,
            calibration=calibration,
            images=images,
            ssm=ssm.value,
            outliers=outliers.value,
            target=target.value,
            arch=arch,
            include=tuple(include or ("*",)),
            exclude=tuple(exclude or ()),
            verify=verify,
            max_drop=max_drop,
            dry_run=dry_run,
            strict=strict,
            report=report,
            batch_size=batch_size,
            seed=seed,
            allow_pickle=allow_pickle,
            quiet=quiet,
        )
    )


def inspect_command(
    model: Annotated[Path, typer.Argument(help="an artefact, or a model as for compile")],
    format: Annotated[
        Format, typer.Option(help="a table, JSON, or the graph for Graphviz or networkx")
    ] = Format.text,
    after: Annotated[
        str | None, typer.Option(help="of a model: stop after this pass (default: normalising)")
    ] = None,
    block: Annotated[
        str | None, typer.Option(help="this block and its neighbours only, such as layers.0")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="file to write (stdout)")
    ] = None,
    calibration: Annotated[str, typer.Option(help="images for the quantizing passes")] = "noise",
    arch: Annotated[
        str | None, typer.Option(help="architecture, where the weights cannot tell")
    ] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="unpickle MODEL: it can run any code")
    ] = False,
) -> None:
    """Show the graph of an artefact, or of a model after a pass: bits, kernels, outlier share."""
    from ouro_compiler.cli.inspect import run

    run(
        model,
        format=format.value,
        after=after,
        block=block,
        output=output,
        calibration=calibration,
        arch=arch,
        allow_pickle=allow_pickle,
    )


def _log_passes(verbose: bool) -> None:
    logger = logging.getLogger("ouro_compiler")
    logger.handlers = [logging.StreamHandler(sys.stderr)] if verbose else []
    logger.setLevel(logging.INFO if verbose else logging.WARNING)
    # torch.export explains at length what our own sentence says in one line.
    logging.getLogger("torch.fx.experimental.symbolic_shapes").setLevel(logging.ERROR)


def _app(**commands: Callable[..., None]) -> typer.Typer:
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)
    for name, command in commands.items():
        app.command(name, epilog=EXIT_CODES)(command)
    return app


def _run(app: typer.Typer) -> None:
    """Run an app; an OuroError becomes one line on stderr and its exit code."""
    try:
        app()
    except OuroError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # The reader of our output left: nothing more to say, and no complaint at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def compile_main() -> None:
    """`ouro-compile`"""
    _run(_app(compile=compile_command))


def main() -> None:
    """`ouro`"""
    _run(_app(compile=compile_command, inspect=inspect_command))
