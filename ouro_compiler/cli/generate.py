"""`ouro generate`: calibration images from a model, written where people and programs find them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ouro_compiler.cli.gallery import check_folder, write_gallery
from ouro_compiler.cli.source import ModelSource
from ouro_compiler.config import Preprocessing, SynthesisSpec

if TYPE_CHECKING:
    from ouro_compiler.calibration.synthesis.synthesize import Synthesized


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """The command's options, as given."""

    source: ModelSource
    output: Path
    spec: SynthesisSpec
    device: str
    cache: bool
    quiet: bool


def run(request: GenerateRequest) -> None:
    """Do what the command says. Raises OuroError subclasses.

    Of the processes that torchrun starts the first one writes.
    """
    from ouro_compiler.cli.processes import device_of_process, is_first

    check_folder(request.output)
    device = device_of_process(request.device)
    made, preprocessing = _make(request, device)
    if not is_first():
        return
    write_gallery(request.output, made, preprocessing)
    if not request.quiet:
        _print_result(request, made)


def _make(request: GenerateRequest, device: str) -> tuple[Synthesized, Preprocessing]:
    from ouro_compiler.cli.calibration import synthesis_progress
    from ouro_compiler.cli.processes import is_first, process_group
    from ouro_compiler.frontend.capture import capture
    from ouro_compiler.passes import NORMALIZE
    from ouro_compiler.passes.base import PassContext, run_passes
    from ouro_compiler.synthetic import preprocessing_for, synthetic_images

    loaded = request.source.load()
    shape = loaded.example.shape
    preprocessing = preprocessing_for(shape, loaded.preprocessing)
    gm = capture(loaded.module, loaded.example)
    run_passes(gm, NORMALIZE, PassContext())
    quiet = request.quiet or not is_first()
    with process_group() as workers, synthesis_progress(quiet) as progress:
        made = synthetic_images(
            gm,
            shape,
            request.spec,
            preprocessing=preprocessing,
            device=device,
            cache=request.cache,
            workers=workers,
            progress=progress,
        )
    return made, preprocessing


def _print_result(request: GenerateRequest, made: Synthesized) -> None:
    from rich.table import Table

    from ouro_compiler.calibration.synthesis.loop import CURVE
    from ouro_compiler.cli.console import print_table

    table = Table(show_header=False)
    table.add_row("images", f"{made.description}, {made.spec.iterations} iterations")
    first, last = made.curve[0].tolist(), made.curve[-1].tolist()
    for name, before, after in zip(CURVE, first, last, strict=True):
        table.add_row(f"loss: {name}", f"{before:.4g} -> {after:.4g}")
    for note in made.notes:
        table.add_row("note", note)
    print_table(table)
    print(request.output)
