"""Calibration images of a model that has none: what its graph, its input and the cache decide."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, fx

from ouro_compiler.calibration.calibrate import Progress
from ouro_compiler.calibration.images import Images
from ouro_compiler.calibration.synthesis.loop import Synthesizer
from ouro_compiler.calibration.synthesis.synthesize import Synthesized, synthesize
from ouro_compiler.calibration.synthesis.workers import Workers
from ouro_compiler.config import Preprocessing, SynthesisSpec
from ouro_compiler.errors import CacheError, UsageError
from ouro_compiler.frontend.preprocessing import default_preprocessing
from ouro_compiler.graph import constant_names, get_constant
from ouro_compiler.kernels.cache import cache_directory
from ouro_compiler.report import CalibrationRow

logger = logging.getLogger(__name__)


class UnsynthesizableError(UsageError):
    """No images can be synthesised from this model."""


@torch.inference_mode(False)  # what is made under it takes no part in gradients
def synthetic_images(
    gm: fx.GraphModule,
    shape: Sequence[int],
    spec: SynthesisSpec,
    *,
    preprocessing: Preprocessing | None = None,
    device: torch.device | str = "cpu",
    cache: bool = True,
    workers: Workers | None = None,
    progress: Progress | None = None,
) -> Synthesized:
    """Make images for a normalised graph, which stays as it is, or find them in the cache.

    shape: its input (B, C, H, W). preprocessing: of its own images; its size is not read. Raises
    UnsynthesizableError for a model whose input is no square image, or that says nothing of its
    images, and UsageError for images that are not finite.
    """
    try:
        synthesizer = Synthesizer(
            detached_copy(gm, torch.device(device)),
            preprocessing_for(shape, preprocessing),
            spec,
            device=device,
        )
    except UsageError as error:
        raise UnsynthesizableError(str(error)) from error
    folder = _folder() if cache else None
    return synthesize(synthesizer, folder=folder, workers=workers, progress=progress)


def preprocessing_for(shape: Sequence[int], given: Preprocessing | None) -> Preprocessing:
    """Of the images that an input (B, C, H, W) takes. Raises UsageError if it takes no such."""
    if len(shape) != 4 or shape[1] not in (1, 3) or shape[2] != shape[3]:
        found = ", ".join(["B", *map(str, shape[1:])])
        raise UsageError(
            f"the model takes ({found}), and only square images of 1 or 3 channels can be "
            "synthesised: pass calibration images"
        )
    if given is None:
        return default_preprocessing(shape[1], shape[2])
    if given.channels != shape[1]:
        raise UsageError(
            f"preprocessing is for images of {given.channels} channels, the model takes {shape[1]}"
        )
    return replace(given, size=shape[2])


def synthesis_device(target: str) -> str:
    """Where images are made when nobody says: on the target, if it is here."""
    return "cuda" if target == "cuda" and torch.cuda.is_available() else "cpu"


def calibration_row(images: Images) -> CalibrationRow:
    """What calibrated, for the report."""
    row = CalibrationRow(description=images.description, images=len(images))
    if isinstance(images, Synthesized):
        row.synthesis, row.notes = images.spec.to_dict(), images.notes
    return row


def detached_copy(gm: fx.GraphModule, device: torch.device) -> fx.GraphModule:
    """The same graph on the same constants, as buffers, which makes its own tensors on `device`."""
    constants: dict[str, Tensor] = {}
    nodes = {str(node.target): node for node in gm.graph.nodes if node.op == "get_attr"}
    for name in constant_names(gm):
        value = get_constant(gm, nodes[name])
        assert value is not None
        constants[name] = value.clone() if value.is_inference() else value.detach()
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    graph.set_codegen(gm.graph._codegen)  # what makes one tensor of a tuple
    for node in graph.nodes:
        if node.kwargs.get("device") is not None:
            node.kwargs = {**node.kwargs, "device": device}
    return fx.GraphModule(constants, graph)


def _folder() -> Path | None:
    try:
        return cache_directory("synthetic")
    except CacheError as error:
        logger.warning("synthesised images are not kept: %s", error)
        return None
