"""The command line: `ouro-compile MODEL --w4a4 ...` and `ouro COMMAND`.

Progress goes to stderr, results to stdout. Exit codes are those of `ouro_compiler.errors`.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ouro_compiler.cli import options
from ouro_compiler.cli.compare_options import compare_command
from ouro_compiler.cli.tune_options import tune_command
from ouro_compiler.errors import OuroError, UsageError

if TYPE_CHECKING:
    from ouro_compiler.cli.source import ModelSource

EXIT_CODES = """\b
Exit codes: 0 done; 2 usage or data; 3 the model is missing, unreadable or cannot be traced;
4 a selected layer was refused under --strict; 5 verification failed; 6 the device is missing."""


def compile_command(
    model: options.ModelArgument,
    w4a4: options.W4a4 = False,
    w4a8: options.W4a8 = False,
    w6a6: options.W6a6 = False,
    w8a8: options.W8a8 = False,
    output: options.Output = None,
    calibration: options.Calibration = None,
    images: options.Images = 128,
    iterations: options.Iterations = None,
    no_cache: options.NoCache = False,
    ssm: options.SsmOption = options.Ssm.params,
    recipe: options.RecipeOption = "ouromamba",
    settings: options.Settings = None,
    outliers: options.OutliersOption = options.Outliers.dynamic,
    inlier_scale: options.InlierScaleOption = options.InlierScale.per_time_step,
    target: options.TargetOption = options.TargetName.cpu,
    precompile: options.Precompile = None,
    arch: options.Arch = None,
    ema: options.Ema = False,
    model_arg: options.ModelArg = None,
    checkpoint: options.Checkpoint = None,
    input_shape: options.InputShape = None,
    include: options.Include = None,
    exclude: options.Exclude = None,
    verify: options.Verify = None,
    max_drop: options.MaxDrop = None,
    refine: options.Refine = False,
    mixed: options.Mixed = False,
    budget_mb: options.BudgetMb = None,
    min_snr: options.MinSnr = None,
    replay: options.Replay = None,
    dry_run: options.DryRun = False,
    strict: options.Strict = False,
    report: options.Report = None,
    batch_size: options.BatchSize = 32,
    seed: options.Seed = 0,
    allow_pickle: options.AllowPickle = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Compile MODEL into a quantized artefact."""
    from ouro_compiler.cli.compile import CompileRequest, run

    chosen = [
        name for name, on in (("w4a4", w4a4), ("w4a8", w4a8), ("w6a6", w6a6), ("w8a8", w8a8)) if on
    ]
    if len(chosen) > 1:
        raise UsageError(f"choose one of --{' and --'.join(chosen)}")
    if chosen and replay is not None:
        raise UsageError(f"--replay has bits of its own: leave out --{chosen[0]}")
    _log_passes(quiet, verbose)
    run(
        CompileRequest(
            source=_source(model, arch, ema, model_arg, checkpoint, input_shape, allow_pickle),
            preset=chosen[0] if chosen else "w4a4",
            output=output,
            calibration=calibration,
            images=images,
            iterations=iterations,
            cache=not no_cache,
            ssm=ssm.value,
            recipe=recipe,
            settings=tuple(settings or ()),
            outliers=outliers.value,
            inlier_scale=inlier_scale.name,
            target=target.value,
            precompile=precompile,
            include=tuple(include or ("*",)),
            exclude=tuple(exclude or ()),
            verify=verify,
            max_drop=max_drop,
            refine=refine,
            mixed=mixed,
            budget_mb=budget_mb,
            min_snr=min_snr,
            replay=replay,
            dry_run=dry_run,
            strict=strict,
            report=report,
            batch_size=batch_size,
            seed=seed,
            quiet=quiet,
        )
    )


def generate_command(
    model: options.ModelArgument,
    output: Annotated[Path, typer.Option("-o", "--output", help="folder to write")],
    images: Annotated[int, typer.Option(min=1, help="how many")] = 128,
    iterations: options.Iterations = None,
    features: options.FeaturesOption = options.Features.yp,
    output_loss: options.OutputLossOption = options.OutputLoss.ce,
    batch_size: options.SynthesisBatch = None,
    seed: options.Seed = 0,
    device: Annotated[options.TargetName, typer.Option(help="where")] = options.TargetName.cpu,
    no_cache: options.NoCache = False,
    arch: options.Arch = None,
    ema: options.Ema = False,
    model_arg: options.ModelArg = None,
    checkpoint: options.Checkpoint = None,
    input_shape: options.InputShape = None,
    allow_pickle: options.AllowPickle = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Make calibration images from MODEL alone. torchrun shares the work among processes."""
    from ouro_compiler.cli.generate import GenerateRequest, run
    from ouro_compiler.config import SynthesisSpec

    _log_passes(quiet, verbose)
    run(
        GenerateRequest(
            source=_source(model, arch, ema, model_arg, checkpoint, input_shape, allow_pickle),
            output=output,
            spec=SynthesisSpec(
                images=images,
                iterations=iterations,
                features=features.value,
                output_loss=output_loss.value,
                batch_size=batch_size,
                seed=seed,
            ),
            device=device.value,
            cache=not no_cache,
            quiet=quiet,
        )
    )


def eval_command(
    model: Annotated[str, typer.Argument(help="an artefact, or a model as for compile")],
    data: Annotated[
        str, typer.Option(help="class folders, or .npz or .safetensors of images and labels")
    ],
    against: Annotated[
        str | None, typer.Option(help="an artefact or a model to compare predictions with")
    ] = None,
    images: Annotated[int | None, typer.Option(min=1, help="how many at most (all)")] = None,
    batch_size: options.BatchSize = 32,
    device: Annotated[options.TargetName, typer.Option(help="where")] = options.TargetName.cpu,
    json: Annotated[Path | None, typer.Option(help="write the result, every class too")] = None,
    seed: Annotated[int, typer.Option(help="of choosing --images among those of folders")] = 0,
    arch: options.Arch = None,
    ema: options.Ema = False,
    model_arg: options.ModelArg = None,
    checkpoint: options.Checkpoint = None,
    input_shape: options.InputShape = None,
    allow_pickle: options.AllowPickle = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure accuracy and speed on labelled images. torchrun shares the work among processes."""
    from ouro_compiler.cli.evaluate import EvalRequest, run

    run(
        EvalRequest(
            source=_source(model, arch, ema, model_arg, checkpoint, input_shape, allow_pickle),
            data=data,
            against=against,
            images=images,
            batch_size=batch_size,
            device=device.value,
            json=json,
            seed=seed,
            quiet=quiet,
        )
    )


def inspect_command(
    model: Annotated[str, typer.Argument(help="an artefact, or a model as for compile")],
    format: Annotated[
        options.Format, typer.Option(help="a table, JSON, or the graph for Graphviz or networkx")
    ] = options.Format.text,
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
    html: options.Html = None,
    trace: options.Trace = None,
    images: options.PageImages = None,
    preset: options.PagePreset = None,
    recipe: options.InspectedRecipe = None,
    setting: options.Settings = None,
    time: options.PageTime = False,
    arch: options.Arch = None,
    ema: options.Ema = False,
    model_arg: options.ModelArg = None,
    checkpoint: options.Checkpoint = None,
    input_shape: options.InputShape = None,
    allow_pickle: options.AllowPickle = False,
) -> None:
    """Show the graph of an artefact, or of a model after a pass: bits, kernels, outlier share."""
    from ouro_compiler.cli.inspect import InspectRequest, run

    run(
        InspectRequest(
            source=_source(model, arch, ema, model_arg, checkpoint, input_shape, allow_pickle),
            format=format.value,
            after=after,
            block=block,
            output=output,
            calibration=calibration,
            html=html,
            trace=trace,
            images=images,
            preset=preset,
            recipe=recipe,
            settings=tuple(setting or ()),
            time=time,
        )
    )


def export_onnx_command(
    model: Annotated[str, typer.Argument(help="an artefact, or a model as for compile")],
    output: Annotated[Path, typer.Option("-o", "--output", help="file to write")],
    opset: Annotated[int, typer.Option(help="18 to 24; 4-bit initializers need 21")] = 21,
    scan: Annotated[
        options.ScanForm, typer.Option(help="ONNX Scan, or com.microsoft.LinearAttention")
    ] = options.ScanForm.scan,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="do not compare with ours in onnxruntime")
    ] = False,
    arch: options.Arch = None,
    ema: options.Ema = False,
    model_arg: options.ModelArg = None,
    checkpoint: options.Checkpoint = None,
    input_shape: options.InputShape = None,
    allow_pickle: options.AllowPickle = False,
    quiet: options.Quiet = False,
) -> None:
    """Write MODEL as ONNX, and compare it with ours in onnxruntime (5 if outputs differ)."""
    from ouro_compiler.cli.export_onnx import run

    run(
        _source(model, arch, ema, model_arg, checkpoint, input_shape, allow_pickle),
        output=output,
        opset=opset,
        scan=scan.value,
        verify=not no_verify,
        quiet=quiet,
    )


def _source(
    name: str,
    arch: str | None,
    ema: bool,
    model_arg: list[str] | None,
    checkpoint: Path | None,
    input_shape: str | None,
    allow_pickle: bool,
) -> ModelSource:
    """The options that say where a model comes from, the same for every command."""
    from ouro_compiler.cli.source import ModelSource

    return ModelSource(
        name=name,
        arch=arch,
        ema=ema,
        arguments=tuple(model_arg or ()),
        checkpoint=checkpoint,
        input_shape=input_shape,
        allow_pickle=allow_pickle,
    )


def _log_passes(quiet: bool, verbose: bool) -> None:
    if quiet and verbose:
        raise UsageError("choose one of --quiet and --verbose")
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
    commands: dict[str, Callable[..., None]]
    commands = {"compile": compile_command, "generate": generate_command, "eval": eval_command}
    commands |= {"compare": compare_command, "inspect": inspect_command, "tune": tune_command}
    _run(_app(**commands, **{"export-onnx": export_onnx_command}))
