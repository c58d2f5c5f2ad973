"""compile(): the whole pipeline on one page."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from ouro_compiler.calibration.calibrate import Progress
from ouro_compiler.calibration.expand import expand
from ouro_compiler.calibration.images import Images as Images
from ouro_compiler.calibration.images import ResizedImages, image_of_other_resolution, shown
from ouro_compiler.calibration.images import TensorImages as TensorImages
from ouro_compiler.calibration.rows import site_rows
from ouro_compiler.config import (
    W4A4,
    MixedSpec,
    Preprocessing,
    QuantConfig,
    SynthesisSpec,
    Target,
)
from ouro_compiler.errors import ModelError, RefusedLayerError, UsageError
from ouro_compiler.frontend.capture import capture, export
from ouro_compiler.lowering.lower import lower
from ouro_compiler.measurement import measure, outputs_on
from ouro_compiler.measurement import timed as timed
from ouro_compiler.mixed_precision.search import choose_bits
from ouro_compiler.passes import NORMALIZE, PIPELINE, QUANTIZE
from ouro_compiler.passes.base import OnPass, PassContext, pass_name, run_passes
from ouro_compiler.recipes import find_recipe
from ouro_compiler.recipes.planning import Plan
from ouro_compiler.refinement import refined
from ouro_compiler.report import LayerRow, Report
from ouro_compiler.runtime.artifact import build_manifest, checksum
from ouro_compiler.runtime.compiled_model import CompiledModel
from ouro_compiler.sizes import bytes_by_part
from ouro_compiler.synthetic import calibration_row, synthesis_device, synthetic_images

Captured = tuple[fx.GraphModule, Plan]  # normalised and planned, by `prepare`


def compile(
    model: nn.Module | torch.export.ExportedProgram,
    example_inputs: Tensor | tuple[Tensor],
    config: QuantConfig = W4A4,
    *,
    calibration: Tensor | Images | SynthesisSpec | None = None,
    verify: Images | None = None,
    mixed: MixedSpec | None = None,
    target: Target | None = None,
    preprocessing: Preprocessing | None = None,
    strict: bool = False,
    batch_size: int = 32,
    cache: bool = True,
    progress: Progress | None = None,
    on_pass: OnPass | None = None,
) -> CompiledModel:
    """Compile a model of one image tensor into a quantized CompiledModel.

    example_inputs: one batch (B, C, H, W), any B >= 1. calibration: images (n, C, H, W) in the
    model's own normalisation; of another resolution only with `inlier_scale` per_tensor, for models
    that take both; or how to synthesise them from the model (None: SynthesisSpec()), which is done
    once and kept in the user's cache unless `cache` is False (as are learned scales). verify:
    images, with labels if there are any, on which accuracy and logits SNR before and after are
    measured; without it they are measured on the calibration images. mixed: what to choose the bits
    of every layer for, starting from the configuration's (docs/mixed_precision.md).
    preprocessing: of the model's images, for the artefact.
    strict: raise RefusedLayerError when a layer that the recipe selected stays in floating point.
    on_pass: called after the capture, under the name "capture", and after every pass.
    Raises UsageError for images that do not fit, or a model they cannot be synthesised from, and
    ModelError if the model cannot be traced.
    """
    example = example_inputs[0] if isinstance(example_inputs, tuple) else example_inputs
    config = config.for_target(target or "cpu")
    report = Report(config=config.to_dict())
    find_recipe(config.recipe).configure(config)  # refuses what it cannot mean, before any work
    with timed(report, "capture"):
        gm = capture(model, example)
        if on_pass is not None:
            on_pass("capture", True, gm)
        plan = prepare(gm, config, on_pass)
        if strict:
            refuse_skipped(plan.rows)
    if calibration is None or isinstance(calibration, SynthesisSpec):
        with timed(report, "synthesise"):
            images: Images = synthetic_images(
                gm,
                example.shape,
                calibration or SynthesisSpec(),
                preprocessing=preprocessing,
                device=synthesis_device(target or "cpu"),
                cache=cache,
                progress=progress,
            )
    else:
        images = TensorImages(calibration) if isinstance(calibration, Tensor) else calibration
    with timed(report, "capture"):
        captured = _capture_for(model, images, example, config, plan)
    if mixed is not None:
        if captured is not None:
            raise UsageError("mixed precision needs calibration images of the model's resolution")
        with timed(report, "mixed precision"):
            config, plan, report.mixed = choose_bits(
                gm, plan, config, mixed, images, verify, batch_size=batch_size, progress=progress
            )
        report.config = config.to_dict()
    program = quantize(
        gm,
        plan,
        example,
        config,
        report,
        calibration=images,
        calibrated=captured,
        verify=verify,
        target=target or "cpu",
        strict=strict,
        batch_size=batch_size,
        cache=cache,
        progress=progress,
        on_pass=on_pass,
    )
    manifest = build_manifest(
        program,
        config=config.to_dict(),
        target=target or "cpu",
        shape=list(example.shape),
        preprocessing=preprocessing.to_dict() if preprocessing else None,
        report=report.to_dict(timing=False),
    )
    compiled = CompiledModel(program, manifest)
    compiled.manifest["checksum"] = checksum(compiled)
    compiled.seconds = dict(report.seconds)
    compiled.full_report = report.to_dict()
    return compiled


def _capture_for(
    model: nn.Module | torch.export.ExportedProgram,
    images: Images,
    example: Tensor,
    config: QuantConfig,
    plan: Plan,
) -> Captured | None:
    """The graph and plan to calibrate on images of another resolution than the example's."""
    recipe = find_recipe(config.recipe)
    scale = recipe.configure(config).activations.inlier_scale if recipe.resizable else None
    image = image_of_other_resolution(images, example.shape, scale)
    if image is None:
        return None
    theirs, ours = shown(image.shape[2:]), shown(example.shape[2:])
    refusal = f"images of {theirs} cannot calibrate this model for {ours}"
    if isinstance(model, torch.export.ExportedProgram):
        raise UsageError(f"{refusal}: an exported program takes one resolution, so use {ours}")
    try:
        gm = capture(model, image)
    except ModelError as error:
        raise UsageError(f"{refusal}, since it does not run at {theirs} ({error})") from error
    plan.notes.append(f"calibrated on images of {theirs}, compiled for {ours}")
    return gm, prepare(gm, config)


def prepare(gm: fx.GraphModule, config: QuantConfig, on_pass: OnPass | None = None) -> Plan:
    """Normalise a captured graph in place, and plan what the recipe does with each layer."""
    context = PassContext(config=config, on_pass=on_pass)
    run_passes(gm, NORMALIZE, context)
    recipe = find_recipe(config.recipe)
    plan = recipe.plan(gm, recipe.configure(config))
    plan.notes[:0] = context.notes
    return plan


def quantize(
    gm: fx.GraphModule,
    plan: Plan,
    example: Tensor,
    config: QuantConfig,
    report: Report,
    *,
    calibration: Images,
    calibrated: Captured | None = None,
    verify: Images | None = None,
    target: Target = "cpu",
    strict: bool = False,
    batch_size: int = 32,
    cache: bool = True,
    progress: Progress | None = None,
    on_pass: OnPass | None = None,
) -> torch.export.ExportedProgram:
    """Calibrate, quantize, lower and measure a prepared graph, filling the report.

    gm and plan: what `prepare` left, edited in place. example: one batch (B, C, H, W). calibrated:
    the same of the calibration images' resolution, if it is another. The other arguments are those
    of compile(). Of a graph with several outputs the first is measured.
    Raises UsageError for images that are not finite, RefusedLayerError under strict, and
    VerificationError for outputs that are not finite.
    """
    recipe = find_recipe(config.recipe)
    config = recipe.configure(config)
    before = bytes_by_part(gm, as_half=True)
    report.calibration = calibration_row(calibration)
    with timed(report, "reference"):
        resized = ResizedImages(calibration, example.shape[2:]) if calibrated else calibration
        measured = verify or resized
        name = "verifying: floating point" if verify else "measuring: floating point"
        logits = outputs_on(gm, measured, batch_size, name, progress)
    with timed(report, "calibrate"):
        graph, found = calibrated or (gm, plan)
        parameters = recipe.calibrate(
            graph, found, config, calibration, batch_size=batch_size, progress=progress
        )
    if config.refine.epochs:
        with timed(report, "refine"):
            better = refined(
                graph,
                parameters,
                config,
                calibration,
                device=synthesis_device(target),
                cache=cache,
                progress=progress,
            )
            parameters, report.refine = better.calibration, better.report
    if calibrated is not None:
        parameters = expand(parameters, plan.sites)
    with timed(report, "quantize"):
        context = PassContext(
            config=config, sites=plan.sites, calibration=parameters, on_pass=on_pass
        )
        run_passes(gm, QUANTIZE, context)
        report.layers = plan.rows
        report.kernels, notes = lower(gm, plan.rows, target)
        report.notes = [*plan.notes, *context.notes, *notes]
        if strict:
            refuse_skipped(report.layers)
        program = export(gm, example)
        report.fill_bytes(before, bytes_by_part(gm))
    with timed(report, "measure"):
        counter = measure(program, report, measured, logits, batch_size, progress)
        report.sites = site_rows(plan.sites, parameters.sites, config, counter.shares())
        report.snr_data = measured.description
    return program


def plan_layers(
    model: nn.Module | torch.export.ExportedProgram,
    example: Tensor,
    config: QuantConfig,
    *,
    strict: bool = False,
) -> list[LayerRow]:
    """What compile() would do with each layer, without images: the command's --dry-run."""
    rows = prepare(capture(model, example), config).rows
    if strict:
        refuse_skipped(rows)
    return rows


def graph_after(
    model: nn.Module | torch.export.ExportedProgram,
    example: Tensor,
    after: str | None,
    *,
    calibration: Images,
    config: QuantConfig = W4A4,
) -> tuple[fx.GraphModule, str]:
    """The graph after the named pass (None: the last normalising one), and the pass's name.

    Passes that quantize are calibrated on `calibration`. Raises UsageError for an unknown name.
    """
    names = [pass_name(one) for one in PIPELINE]
    wanted = after or pass_name(NORMALIZE[-1])
    if wanted not in names:
        raise UsageError(f"no pass is called {wanted}: the passes are {', '.join(names)}")
    chosen = PIPELINE[: names.index(wanted) + 1]
    gm = capture(model, example)
    run_passes(gm, chosen[: len(NORMALIZE)], PassContext(config=config))
    if len(chosen) > len(NORMALIZE):
        recipe = find_recipe(config.recipe)
        config = recipe.configure(config)
        plan = recipe.plan(gm, config)
        found = recipe.calibrate(gm, plan, config, calibration, batch_size=len(calibration))
        context = PassContext(config=config, sites=plan.sites, calibration=found)
        run_passes(gm, chosen[len(NORMALIZE) :], context)
    return gm, wanted


def refuse_skipped(rows: Sequence[LayerRow]) -> None:
    """Raise RefusedLayerError if a layer that the recipe selected stays in floating point."""
    refused = [row for row in rows if row.status == "skipped" and row.selected]
    if refused:
        raise RefusedLayerError(
            f"{len(refused)} selected layers would stay in floating point, the first is "
            f"{refused[0].name}: {refused[0].reason}"
        )
