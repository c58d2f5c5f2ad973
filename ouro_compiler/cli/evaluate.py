"""`ouro eval`: accuracy and speed of an artefact or a model on labelled images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ouro_compiler.cli.console import print_table, progress_bars, write_json
from ouro_compiler.cli.source import ModelSource
from ouro_compiler.config import Preprocessing
from ouro_compiler.errors import ModelError, UsageError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ouro_compiler.calibration.synthesis.workers import Workers
    from ouro_compiler.data import ImageData
    from ouro_compiler.frontend.checkpoint import LoadedModel
    from ouro_compiler.scoring import Scores

_WORST = 10


@dataclass(frozen=True, kw_only=True)
class EvalRequest:
    """The command's options, as given."""

    source: ModelSource
    data: str
    against: str | None
    images: int | None
    batch_size: int
    device: str
    json: Path | None
    seed: int
    quiet: bool


@dataclass(frozen=True, kw_only=True)
class _Subject:
    """A model that is ready to run on a device."""

    name: str
    kind: str
    run: Callable[[torch.Tensor], Any]
    preprocessing: Preprocessing
    note: str | None = None


def run(request: EvalRequest) -> None:
    """Do what the command says. Raises OuroError subclasses.

    Of the processes that torchrun starts the first one writes.
    """
    import torch

    from ouro_compiler.cli.calibration import labelled_images
    from ouro_compiler.cli.processes import device_of_process, is_first, process_group

    path = request.json
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise UsageError(f"--json {path}: not a file in an existing folder")
    device = torch.device(device_of_process(request.device))
    sources = _sources(request)
    subjects = [_open(source, device) for source in sources]
    _check_inputs(subjects)
    images = labelled_images(
        request.data,
        subjects[0].preprocessing,
        option="--data",
        limit=request.images,
        seed=request.seed,
    )
    with process_group() as workers:
        scores = _score(request, subjects, images, device, workers)
        processes = workers.count
    if not is_first():
        return
    result = _result(request, subjects, images, scores, processes)
    if path is not None:
        write_json(path, result)
    if not request.quiet:
        _print_result(result)


def _sources(request: EvalRequest) -> list[ModelSource]:
    from ouro_compiler.runtime.artifact import is_artifact

    names = [request.source.name, *([] if request.against is None else [request.against])]
    sources = [replace(request.source, name=name) for name in names]
    if all(is_artifact(name) for name in names) and sources[0] != ModelSource(name=names[0]):
        raise UsageError(
            "--arch, --ema, --model-arg, --checkpoint, --input-shape and --allow-pickle are for "
            f"models, and {' and '.join(names)} is compiled already"
        )
    return sources


def _open(source: ModelSource, device: torch.device) -> _Subject:
    from ouro_compiler.runtime.artifact import is_artifact, load

    if not is_artifact(source.name):
        loaded = source.load()
        return _Subject(
            name=source.name,
            kind="floating point",
            run=eager_model(source.name, loaded, device),
            preprocessing=loaded.preprocessing,
        )
    compiled = load(source.name, device=device)
    stored = compiled.manifest["preprocessing"]
    note = None
    try:
        if stored is None:
            preprocessing = _default(compiled.manifest["input"]["shape"])
            note = f"{source.name} does not say how images are prepared: a mean of "
            note += f"{preprocessing.mean} and a std of {preprocessing.std} were taken"
        else:
            preprocessing = Preprocessing.from_dict(stored)
    except (UsageError, ModelError, TypeError, ValueError) as error:
        raise ModelError(f"cannot prepare images for {source.name}: {error}") from error
    return _Subject(
        name=source.name,
        kind="artefact",
        run=compiled,
        preprocessing=preprocessing,
        note=note,
    )


def _default(shape: list[int]) -> Preprocessing:
    from ouro_compiler.frontend.preprocessing import default_preprocessing

    if len(shape) != 4 or shape[2] != shape[3]:
        raise ModelError(f"it takes inputs of shape {shape[1:]}, not square images")
    return default_preprocessing(shape[1], shape[2])


def eager_model(name: str, loaded: LoadedModel, device: torch.device) -> nn.Module:
    """A model as it came, on a device."""
    import torch

    if not isinstance(loaded.module, torch.export.ExportedProgram):
        return loaded.module.to(device)
    from torch.export.passes import move_to_device_pass

    from ouro_compiler.frontend.capture import batch_dimension_is_dynamic, capture

    program = loaded.module
    if device.type != "cpu":
        program = move_to_device_pass(program, device)
    gm = capture(program, loaded.example)
    if not batch_dimension_is_dynamic(gm):
        raise ModelError(
            f"{name} was exported for one batch size: export it with a dynamic first dimension"
        )
    return gm


def _check_inputs(subjects: list[_Subject]) -> None:
    shapes = [(one.preprocessing.channels, one.preprocessing.size) for one in subjects]
    if len(set(shapes)) > 1:
        takes = [f"{one.name} takes {_shown(one.preprocessing)}" for one in subjects]
        raise UsageError(f"{' and '.join(takes)}: they cannot be compared on the same images")


def _shown(preprocessing: Preprocessing) -> str:
    size = preprocessing.size
    return f"{size}x{size}, {preprocessing.channels} channels"


def _score(
    request: EvalRequest,
    subjects: list[_Subject],
    images: ImageData,
    device: torch.device,
    workers: Workers,
) -> Scores:
    """The scores of all processes together; batch i is process i's modulo their number."""
    import torch

    from ouro_compiler.cli.processes import add_up, is_first
    from ouro_compiler.scoring import score

    if device.type == "cuda":
        torch.cuda.set_device(device)
    size = request.batch_size
    own = sum(
        min(size, len(images) - at)
        for at in range(workers.rank * size, len(images), workers.count * size)
    )
    with progress_bars(request.quiet or not is_first()) as progress:
        found = score(
            [one.run for one in subjects],
            images,
            batch_size=size,
            device=device,
            first=workers.rank,
            step=workers.count,
            on_batch=progress and (lambda done: progress("evaluating", done, own)),
        )
    for tensor in (found.hits, found.agreeing, found.powers, found.speed):
        add_up(tensor, workers)
    add_up(found.seconds, workers, largest=True)
    return found


def _result(
    request: EvalRequest,
    subjects: list[_Subject],
    images: ImageData,
    scores: Scores,
    processes: int,
) -> dict[str, Any]:
    """The JSON of docs/evaluation.md."""
    from ouro_compiler.scoring import SCORES_SCHEMA_VERSION, TOP, logits_snr_db, model_row

    models = [
        {"name": one.name, "kind": one.kind, **model_row(scores, index, images.class_names)}
        for index, one in enumerate(subjects)
    ]
    compared = len(models) == 2
    classes = scores.hits.shape[1]
    return {
        "schema_version": SCORES_SCHEMA_VERSION,
        "data": images.description,
        "images": len(images),
        "classes": classes,
        "outputs": scores.outputs,
        "top_k": min(TOP, scores.outputs),
        "preprocessing": subjects[0].preprocessing.to_dict(),
        "device": request.device,
        "batch_size": request.batch_size,
        "processes": processes,
        "model": models[0],
        "against": models[1] if compared else None,
        "agreement": int(scores.agreeing) / len(images) if compared else None,
        "agreeing": int(scores.agreeing) if compared else None,
        "logits_snr_db": logits_snr_db(scores) if compared else None,
        "seconds": float(scores.seconds),
        "images_per_second": len(images) / float(scores.seconds),
        "notes": _notes(subjects, images, scores),
    }


def _notes(subjects: list[_Subject], images: ImageData, scores: Scores) -> list[str]:
    notes = [one.note for one in subjects if one.note is not None]
    if images.class_names is not None and len(images.class_names) < scores.outputs:
        notes.append(
            f"the {len(images.class_names)} folders were taken for the first of the model's "
            f"{scores.outputs} classes"
        )
    if len({one.preprocessing for one in subjects}) > 1:
        notes.append(
            f"images were prepared as {subjects[0].name} wants them; {subjects[1].name} was made "
            "for another mean, std or crop"
        )
    return notes


def _print_result(result: dict[str, Any]) -> None:
    from rich.table import Table

    from ouro_compiler.scoring import COLD_BATCHES, worst_classes

    table = Table(show_header=False)
    table.add_row("images", f"{result['data']}, {result['classes']} classes")
    for key, prefix in (("model", ""), ("against", "against: ")):
        row = result[key]
        if row is None:
            continue
        table.add_row(f"{prefix}{row['kind']}", row["name"])
        for name, label in (("top1", "top-1"), ("top5", f"top-{result['top_k']}")):
            share = f"{100 * row[name]:.2f} % ({row['correct'][name]} of {result['images']})"
            table.add_row(label, share)
        table.add_row("the model alone", _speed(row["images_per_second"], row["timed_images"]))
    if result["against"] is not None:
        equal = f"{result['agreeing']} of {result['images']}"
        table.add_row("equal predictions", f"{100 * result['agreement']:.2f} % ({equal})")
        snr = result["logits_snr_db"]
        table.add_row("SNR of the logits", "no difference" if snr is None else f"{snr:.2f} dB")
    shared = f", {result['processes']} processes" if result["processes"] > 1 else ""
    table.add_row(
        "all, with decoding",
        f"{result['images_per_second']:.1f} images/s ({result['seconds']:.1f} s on "
        f"{result['device']}, batches of {result['batch_size']}{shared})",
    )
    table.add_row("timing", f"warm: the first {COLD_BATCHES} batches of each size are left out")
    for note in result["notes"]:
        table.add_row("note", note)
    print_table(table)
    worst = worst_classes(result["model"]["per_class"], _WORST)
    classes = Table("class", "name", "images", "top-1", f"top-{result['top_k']}")
    classes.title = "worst classes"
    for row in worst:
        shares = [f"{100 * row[name]:.2f} %" for name in ("top1", "top5")]
        classes.add_row(str(row["class"]), row["name"] or "", str(row["images"]), *shares)
    print_table(classes)


def _speed(rate: float | None, images: int) -> str:
    if rate is None:
        return "not timed: too few batches of one size"
    return f"{rate:.1f} images/s ({images} images)"
