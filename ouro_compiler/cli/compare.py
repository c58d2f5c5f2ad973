"""`ouro compare`: one model by several recipes, presets and seeds, saved after every run."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ouro_compiler.cli.calibration import (
    calibration_images,
    is_synthetic,
    labelled_images,
    synthesis_progress,
)
from ouro_compiler.cli.compare_request import CompareRequest, Variant, check_request, variants
from ouro_compiler.cli.console import Progress, print_table, write_json, write_text
from ouro_compiler.config import SynthesisSpec
from ouro_compiler.errors import OuroError, UsageError

if TYPE_CHECKING:
    from ouro_compiler.calibration.images import Images
    from ouro_compiler.comparison import Comparison
    from ouro_compiler.data import ImageData
    from ouro_compiler.frontend.checkpoint import LoadedModel

COMPARISON_SCHEMA_VERSION = 1


def run(request: CompareRequest) -> None:
    """Do what the command says. Raises OuroError subclasses; runs that fail are rows first."""
    from ouro_compiler.runtime.compiled_model import resolve_device

    wanted = variants(request)
    check_request(request)
    resolve_device(request.device)
    loaded = request.source.load()
    data = labelled_images(
        request.data, loaded.preprocessing, option="--data", limit=request.eval_images
    )
    with synthesis_progress(request.quiet) as progress:
        session = _Session(request, loaded, data, progress)
        session.run(wanted)
    if not request.quiet:
        _print_result(session.result)
    _raise_failures(session)


class _Session:
    """The rows as they come, saved after each."""

    def __init__(
        self,
        request: CompareRequest,
        loaded: LoadedModel,
        data: ImageData,
        progress: Progress | None,
    ) -> None:
        import torch

        from ouro_compiler.cli.evaluate import eager_model
        from ouro_compiler.comparison import Comparison
        from ouro_compiler.frontend.capture import exported

        self.request, self.progress = request, progress
        self.errors: list[Exception] = []
        program = exported(loaded.module, loaded.example)
        if request.device != "cpu":  # the program's weights stay on the CPU
            loaded = request.source.load()
        device = torch.device(request.device)
        self.comparison = Comparison(
            program,
            eager_model(request.source.name, loaded, device),
            loaded.example.cpu(),
            loaded.preprocessing,
            data,
            batch_size=request.batch_size,
            device=device,
            progress=progress,
        )
        self.calibration = _calibration(request, self.comparison, progress)
        self.result: dict[str, Any] = {
            "schema_version": COMPARISON_SCHEMA_VERSION,
            "made": _made(request, program, data),
            "rows": [],
        }

    def run(self, wanted: list[Variant]) -> None:
        """Score the model as it is, then every run that is not there yet."""
        from ouro_compiler.comparison import failed_row
        from ouro_compiler.scoring import TOP

        request, rows = self.request, self.result["rows"]
        if request.resume:
            rows += _kept(request.json, self.result["made"])
        left = [one for one in wanted if one.key not in [_key(row) for row in rows]]
        self._say(f"{len(wanted) - len(left)} of {len(wanted)} runs are there", bool(rows))
        self.result["floating_point"] = self.comparison.floating_point()
        self.result["top_k"] = min(TOP, self.comparison.outputs)
        self._save()
        for number, one in enumerate(left, 1):
            name = f"{one.recipe} {one.bits} seed {one.seed}"
            images = self.calibration(one.seed)  # what is wrong with them is wrong for every run
            try:
                compiled = self.comparison.compile(one.config, images)
                row = {**self.comparison.measure(compiled, name), "reason": None}
            except Exception as error:  # a method's own fault must not cost the other rows
                self.errors.append(error)
                row = failed_row(error)
            rows.append({**one.key, **row, "config": one.config.to_dict()})
            self._save()
            said = row["reason"] or f"{100 * row['top1']:.2f} %"
            self._say(f"{number} of {len(left)}: {name}: {said}", True)

    def _save(self) -> None:
        from ouro_compiler.cli.compare_plot import plot_accuracy
        from ouro_compiler.cli.compare_table import csv_text, markdown
        from ouro_compiler.comparison import MEASURED

        request = self.request
        if request.json is not None:
            write_json(request.json, self.result)
        if request.csv is not None:
            write_text(request.csv, csv_text(self.result, MEASURED))
        if request.markdown is not None:
            write_text(request.markdown, markdown(self.result))
        if request.plot is not None:
            write_text(request.plot, plot_accuracy(self.result))

    def _say(self, line: str, wanted: bool) -> None:
        if wanted and not self.request.quiet:
            print(line, file=sys.stderr, flush=True)


def _calibration(
    request: CompareRequest, comparison: Comparison, progress: Progress | None
) -> Callable[[int], Images]:
    """The images of a seed, opened or made once."""

    @cache
    def images(seed: int) -> Images:
        found = calibration_images(
            request.calibration,
            comparison.preprocessing,
            count=request.images,
            iterations=request.iterations,
            seed=seed,
        )
        if isinstance(found, SynthesisSpec):
            return _made_from(comparison, found, request, progress)
        return found

    return images


def _made_from(
    comparison: Comparison, spec: SynthesisSpec, request: CompareRequest, progress: Progress | None
) -> Images:
    from ouro_compiler.frontend.capture import capture
    from ouro_compiler.passes import NORMALIZE
    from ouro_compiler.passes.base import PassContext, run_passes
    from ouro_compiler.synthetic import synthesis_device, synthetic_images

    gm = capture(comparison.program, comparison.example)
    run_passes(gm, NORMALIZE, PassContext())
    return synthetic_images(
        gm,
        comparison.example.shape,
        spec,
        preprocessing=comparison.preprocessing,
        device=synthesis_device(request.device),
        cache=request.cache,
        progress=progress,
    )


def _made(request: CompareRequest, program: Any, data: ImageData) -> dict[str, Any]:
    """What all rows of a file have in common."""
    import torch

    from ouro_compiler import __version__
    from ouro_compiler.runtime.artifact import constants_digest

    synthetic = is_synthetic(request.calibration)
    assert data.labels is not None
    return {
        "model": request.source.stem,
        "model_sha256": constants_digest({**program.state_dict, **program.constants}),
        "data": data.description,
        "labels_sha256": constants_digest({"labels": data.labels}),
        "calibration": "synthetic" if synthetic else str(request.calibration),
        "calibration_images": request.images,
        "iterations": request.iterations,
        "settings": list(request.settings),
        "device": request.device,
        "batch_size": request.batch_size,
        "ouro_version": __version__,
        "torch_version": torch.__version__,
    }


def _key(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("recipe", "bits", "seed")}


def _kept(path: Path | None, made: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of an earlier call that did not fail. Raises UsageError if they mean something else."""
    assert path is not None
    if not path.exists():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        before, rows = found["made"], found["rows"]
        kept = [row for row in rows if row["reason"] is None and _key(row)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--resume: {path} is no result of ouro compare") from error
    changed = [name for name in made if before.get(name) != made[name]]
    if changed:
        raise UsageError(
            f"--resume: {path} was made with another {', '.join(changed)}: "
            "leave out --resume to make it anew"
        )
    return kept


def _print_result(result: dict[str, Any]) -> None:
    from ouro_compiler.cli.compare_table import failures, terminal_table

    print_table(terminal_table(result), piped_width=160)
    for line in failures(result["rows"]):
        print(f"failed: {line}")


def _raise_failures(session: _Session) -> None:
    """End with the code of the first run that failed, if one did."""
    if not session.errors:
        return
    first = session.errors[0]
    failed = [row for row in session.result["rows"] if row["reason"] is not None]
    kind = type(first) if isinstance(first, OuroError) else OuroError
    raise kind(
        f"{len(failed)} of {len(session.result['rows'])} runs failed, the first is "
        f"{failed[0]['recipe']} {failed[0]['bits']}: {failed[0]['reason']}"
    ) from first
