"""The options of `ouro compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ouro_compiler.cli import options
from ouro_compiler.cli.source import ModelSource

_Written = Path | None


def compare_command(
    model: options.ModelArgument,
    data: Annotated[
        str, typer.Option(help="labelled: class folders, or .npz or .safetensors of arrays")
    ],
    recipes: Annotated[
        str, typer.Option(help="with commas; NAME, or NAME:SETTING=VALUE:SETTING=VALUE")
    ] = "ouromamba,rtn",
    bits: Annotated[str, typer.Option(help="presets, with commas")] = "w4a4",
    seeds: Annotated[
        str, typer.Option(help="with commas: of choosing or making images, and of the recipe")
    ] = "0",
    settings: options.Settings = None,
    calibration: options.Calibration = None,
    images: options.Images = 128,
    iterations: options.Iterations = None,
    no_cache: options.NoCache = False,
    eval_images: Annotated[
        int | None, typer.Option(min=1, help="labelled images at most (all)")
    ] = None,
    json: Annotated[_Written, typer.Option(help="write every run, after each of them")] = None,
    csv: Annotated[_Written, typer.Option(help="the same as a table of numbers")] = None,
    markdown: Annotated[_Written, typer.Option(help="the table that is printed")] = None,
    plot: Annotated[_Written, typer.Option(help="accuracy by preset as an .svg")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="keep the runs that --json FILE has already")
    ] = False,
    batch_size: options.BatchSize = 32,
    device: Annotated[options.TargetName, typer.Option(help="where")] = options.TargetName.cpu,
    arch: options.Arch = None,
    ema: options.Ema = False,
    model_arg: options.ModelArg = None,
    checkpoint: options.Checkpoint = None,
    input_shape: options.InputShape = None,
    allow_pickle: options.AllowPickle = False,
    quiet: options.Quiet = False,
) -> None:
    """Compile MODEL by several recipes and presets, and measure each against floating point."""
    from ouro_compiler.cli.compare import run
    from ouro_compiler.cli.compare_request import CompareRequest

    run(
        CompareRequest(
            source=ModelSource(
                name=model,
                arch=arch,
                ema=ema,
                arguments=tuple(model_arg or ()),
                checkpoint=checkpoint,
                input_shape=input_shape,
                allow_pickle=allow_pickle,
            ),
            data=data,
            recipes=recipes,
            bits=bits,
            seeds=seeds,
            settings=tuple(settings or ()),
            calibration=calibration,
            images=images,
            iterations=iterations,
            cache=not no_cache,
            eval_images=eval_images,
            json=json,
            csv=csv,
            markdown=markdown,
            plot=plot,
            resume=resume,
            batch_size=batch_size,
            device=device.value,
            quiet=quiet,
        )
    )
