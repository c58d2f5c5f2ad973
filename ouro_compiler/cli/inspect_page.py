"""`ouro inspect --html FILE`: one page about an artefact, or about a model and every pass."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ouro_compiler.errors import UsageError

if TYPE_CHECKING:
    import torch

    from ouro_compiler.calibration.images import Images
    from ouro_compiler.cli.source import ModelSource
    from ouro_compiler.config import Preprocessing, QuantConfig
    from ouro_compiler.inspection.page import PageContent
    from ouro_compiler.inspection.probe import Sample
    from ouro_compiler.inspection.stages import Stage
    from ouro_compiler.runtime.compiled_model import CompiledModel

_SHOWN = 16  # images on the page
_BATCH = 4
_ROUNDS = 5


@dataclass(frozen=True, kw_only=True)
class PageRequest:
    """calibration: a path, "noise" or "synthetic". images: how many at most. config: of a model."""

    source: ModelSource
    html: Path
    calibration: str
    images: int
    config: QuantConfig
    time: bool


def write_page(request: PageRequest) -> None:
    """Write the page. Raises OuroError subclasses."""
    from ouro_compiler.cli.console import human_bytes, write_text
    from ouro_compiler.inspection.page import render_page
    from ouro_compiler.runtime.artifact import is_artifact

    artefact = is_artifact(Path(request.source.name))
    text = render_page(_of_artefact(request) if artefact else _of_model(request))
    write_text(request.html, text)
    print(f"{request.html}: {human_bytes(len(text.encode()))}")


def _of_artefact(request: PageRequest) -> PageContent:
    from ouro_compiler.inspection.network import build_network
    from ouro_compiler.inspection.page import PageContent
    from ouro_compiler.inspection.probe import measure
    from ouro_compiler.inspection.stages import Stage
    from ouro_compiler.runtime.artifact import load

    path = Path(request.source.name)
    compiled = load(path)
    images, preprocessing = images_of_artefact(compiled, request.calibration, request.images)
    report = compiled.report
    shares = {row["name"]: row["outlier_share"] for row in report["sites"]}
    network = build_network(compiled.graph_module, shares, kernels_of(compiled))
    sample = measure(compiled.graph_module, images.batches(_BATCH))
    return PageContent(
        title=path.name,
        stages=[Stage(name="compiled", changed=True, network=network)],
        stage_note="An artefact holds the compiled graph alone: make the page of the model to see "
        "every pass, and errors against floating point.",
        report=report,
        facts=_facts(compiled.manifest),
        sample=sample,
        sample_note=_sample_note(sample, images),
        times=_times(request, compiled.graph_module, images),
        **_shown(images, preprocessing),
        notes=_calibration_notes(report),
    )


def _of_model(request: PageRequest) -> PageContent:
    import ouro_compiler as ouro
    from ouro_compiler.inspection.network import build_network
    from ouro_compiler.inspection.page import PageContent
    from ouro_compiler.inspection.probe import measure
    from ouro_compiler.inspection.stages import Stage, StageRecorder
    from ouro_compiler.passes import NORMALIZE
    from ouro_compiler.passes.base import pass_name

    loaded = request.source.load()
    if request.calibration == "synthetic":
        images = _synthetic(request, loaded.module, loaded.example, loaded.preprocessing)
    else:
        images = _images(request.calibration, loaded.preprocessing, request.images)
    recorder = StageRecorder(keep=pass_name(NORMALIZE[-1]))
    compiled = ouro.compile(
        loaded.module,
        loaded.example,
        request.config,
        calibration=images,
        preprocessing=loaded.preprocessing,
        batch_size=_BATCH,
        on_pass=recorder,
    )
    report = compiled.report
    shares = {row["name"]: row["outlier_share"] for row in report["sites"]}
    network = build_network(compiled.graph_module, shares, kernels_of(compiled))
    stages: Sequence[Stage] = [
        *recorder.stages,
        Stage(name="lowering and export", changed=True, network=network),
    ]
    sample = measure(compiled.graph_module, images.batches(_BATCH), recorder.kept)
    return PageContent(
        title=request.source.stem,
        stages=stages,
        stage_note="Every pass in its order, from the capture to the compiled graph. Nodes that "
        "compute nothing (parts of results, casts of parameters, assertions) are not drawn.",
        report=report,
        facts=_facts(compiled.manifest),
        sample=sample,
        sample_note=_sample_note(sample, images),
        times=_times(request, compiled.graph_module, images),
        **_shown(images, loaded.preprocessing),
        notes=_calibration_notes(report),
    )


def kernels_of(compiled: CompiledModel) -> dict[str, str]:
    """What runs each node of a compiled model, by the node's name."""
    from ouro_compiler.kernels.plan import plan_kernels

    plans = plan_kernels(compiled.graph_module, compiled.target)
    return {plan.node.name: plan.kernel for plan in plans}


def images_of_artefact(
    compiled: CompiledModel, source: str, count: int
) -> tuple[Images, Preprocessing]:
    """Images that an artefact takes, and their preprocessing. Raises UsageError for none such."""
    from ouro_compiler.config import Preprocessing
    from ouro_compiler.synthetic import preprocessing_for

    if source == "synthetic":
        raise UsageError(
            "images are synthesised from a model, not from an artefact: pass noise, a folder, .npz "
            "or .safetensors"
        )
    stored = compiled.manifest["preprocessing"]
    given = None if stored is None else Preprocessing.from_dict(stored)
    try:
        preprocessing = preprocessing_for(compiled.manifest["input"]["shape"], given)
    except UsageError as error:
        raise UsageError(
            "the artefact takes no square images of 1 or 3 channels: --html and --trace cannot run "
            "it"
        ) from error
    return _images(source, preprocessing, count), preprocessing


def _images(source: str, preprocessing: Preprocessing, count: int) -> Images:
    from ouro_compiler.data import noise_images, open_images

    if source == "noise":
        return noise_images(preprocessing, count, 0)
    return open_images(source, preprocessing, limit=count)


def _synthetic(
    request: PageRequest, module: Any, example: torch.Tensor, preprocessing: Preprocessing
) -> Images:
    """Made from the model, or found in the cache."""
    from ouro_compiler.compiler import prepare
    from ouro_compiler.config import QuantConfig, SynthesisSpec
    from ouro_compiler.frontend.capture import capture
    from ouro_compiler.synthetic import synthetic_images

    gm = capture(module, example)
    prepare(gm, QuantConfig())
    spec = SynthesisSpec(images=request.images)
    return synthetic_images(gm, example.shape, spec, preprocessing=preprocessing)


def _facts(manifest: dict[str, Any]) -> list[str]:
    shape = "x".join(map(str, manifest["input"]["shape"][1:]))
    return [f"images {shape}", f"for {manifest['target']}", f"torch {manifest['torch_version']}"]


def _sample_note(sample: Sample, images: Images) -> str:
    if not sample.snr_db:
        return (
            "The error is not measured: an artefact no longer has the model in floating point. "
            f"Charts are of {images.description}."
        )
    return (
        "SNR is of the layer's output against floating point, errors of the layers before "
        f"included, on {images.description}; it is missing where a residual was fused into a layer."
    )


def _times(request: PageRequest, gm: Any, images: Images) -> dict[str, float]:
    from ouro_compiler.inspection.probe import time_nodes

    return time_nodes(gm, next(iter(images.batches(1))), _ROUNDS) if request.time else {}


def _shown(images: Images, preprocessing: Preprocessing) -> dict[str, Any]:
    """The first images as one picture; noise is no picture."""
    from ouro_compiler.cli.gallery import contact_sheet, to_pixels

    if "noise" in images.description:
        return {}
    buffer = io.BytesIO()
    first = next(iter(images.batches(_SHOWN)))
    contact_sheet(to_pixels(first, preprocessing)).save(buffer, format="PNG")
    text = base64.b64encode(buffer.getvalue()).decode()
    return {"png": text, "png_note": f"The first {len(first)} of {images.description}."}


def _calibration_notes(report: dict[str, Any]) -> list[str]:
    row = report["calibration"]
    found = [] if row is None else [f"calibrated on {row['description']}", *row["notes"]]
    return found
