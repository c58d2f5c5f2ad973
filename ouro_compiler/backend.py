"""The backend of `torch.compile(model, backend="ouro", options={...})` (docs/torch_compile.md).

Dynamo's graph takes the road of `ouro_compiler.compile`, from the second step on.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, fx
from torch.export.passes import move_to_device_pass

from ouro_compiler.backend_options import Inner, Options, open_calibration, some_images
from ouro_compiler.compiler import Images, prepare, quantize, refuse_skipped, timed
from ouro_compiler.config import Target
from ouro_compiler.errors import RefusedLayerError, UsageError
from ouro_compiler.frontend.batch import free_batch
from ouro_compiler.frontend.capture import capture
from ouro_compiler.frontend.dynamo import ImageGraph, UncalibratableError, bind, refuse_training
from ouro_compiler.report import LayerRow, Report
from ouro_compiler.synthetic import UnsynthesizableError, synthetic_images

logger = logging.getLogger(__name__)


def ouro(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile a graph of Dynamo's into a quantized one, called with the same flat inputs.

    example_inputs: Dynamo's, one of them the images (B, C, H, W) fp32. options: `Options`. Returns
    a callable that gives a tuple of the graph's outputs; where the graph cannot be calibrated, or
    holds nothing to quantize, `gm` as it was, with one warning that says why.
    Raises UsageError for options that cannot be used, under autocast, and for a model that is in
    training mode, not in fp32 or asked for gradients of its images; ModelError for what
    torch.export cannot trace; RefusedLayerError under `strict`; VerificationError for outputs that
    are not finite.
    """
    read = Options.read(options, mode)
    _refuse_autocast(gm)
    try:
        graph = bind(gm, example_inputs)
        images = open_calibration(read, graph.shape)
        with torch._guards.tracing(None), torch.no_grad():
            module, report = _compile(graph, images, read)
    except UncalibratableError as error:
        if read.strict and not isinstance(error, NothingToQuantizeError):
            raise RefusedLayerError(f"a graph would stay in floating point: {error}") from error
        _warn(f"a graph is returned as it was: {error}")
        return gm.forward
    _warn_of_gradients(example_inputs)
    logger.info(
        "%d of %d layers quantized, SNR %.2f dB on %s",
        len(report.quantized),
        len(report.layers),
        report.logits_snr_db,
        report.snr_data,
    )
    run = _inner(module, example_inputs[graph.index], read.inner)
    return CompiledGraph(module, run, graph.index, report)


class CompiledGraph:
    """What Dynamo calls: its flat inputs in, a tuple of outputs out.

    graph_module: images -> a tuple of tensors, with the quantized constants as buffers. report:
    what became of every layer.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        run: Callable[[Tensor], Sequence[Tensor]],
        index: int,
        report: Report,
    ) -> None:
        self.graph_module, self.report = graph_module, report
        self._run, self._index = run, index

    def __call__(self, *inputs: Any) -> tuple[Tensor, ...]:
        """The graph's outputs; of the inputs only the images are read."""
        with torch.no_grad():
            return tuple(self._run(inputs[self._index]))


# The pipeline


def _compile(graph: ImageGraph, images: Images, options: Options) -> tuple[fx.GraphModule, Report]:
    """The road of compile(). Raises UncalibratableError if nothing is to be quantized."""
    target: Target = "cuda" if graph.device.type == "cuda" else "cpu"
    config = options.config.for_target(target)
    report = Report(config=config.to_dict())
    example = torch.zeros(graph.shape)
    with timed(report, "capture"):
        if graph.dynamic:
            captured = capture(graph.module, example)
        else:
            captured = free_batch(graph.module, some_images(images, graph.shape[0]))
        refuse_training(captured)
        plan = prepare(captured, config)
    if all(row.status == "skipped" for row in plan.rows):
        if options.strict:
            refuse_skipped(plan.rows)
        raise NothingToQuantizeError(_why_nothing(plan.rows))
    if options.synthesis is not None:
        with timed(report, "synthesise"):
            images = _synthetic(captured, graph, options)
    program = quantize(
        captured,
        plan,
        example,
        config,
        report,
        calibration=images,
        target=target,
        strict=options.strict,
        batch_size=options.batch_size,
        cache=options.cache,
    )
    if graph.device.type != "cpu":
        program = move_to_device_pass(program, graph.device)
    return _flat(program), report


def _synthetic(captured: fx.GraphModule, graph: ImageGraph, options: Options) -> Images:
    """Raises UncalibratableError where the graph says nothing of its images."""
    assert options.synthesis is not None
    try:
        return synthetic_images(
            captured,
            graph.shape,
            options.synthesis,
            preprocessing=options.preprocessing,
            device=graph.device.type,
            cache=options.cache,
        )
    except UnsynthesizableError as error:
        raise UncalibratableError(str(error)) from error


class NothingToQuantizeError(UncalibratableError):
    """No layer of the graph is quantized by the recipe and the configuration."""


def _why_nothing(rows: Sequence[LayerRow]) -> str:
    if not rows:
        return "nothing to quantize: it has no linear layer, convolution or selective scan"
    reasons = list(dict.fromkeys(f"{row.name}: {row.reason}" for row in rows))
    more = f", and {len(reasons) - 3} more" if len(reasons) > 3 else ""
    return f"nothing to quantize: {'; '.join(islice(reasons, 3))}{more}"


def _flat(program: torch.export.ExportedProgram) -> fx.GraphModule:
    """The program as a module: images -> a tuple of tensors."""
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    graph = fx.Graph()
    output: Any = graph.graph_copy(module.graph, {})
    graph.output(tuple(output) if isinstance(output, (tuple, list)) else (output,))
    return fx.GraphModule(module, graph)


def _inner(module: fx.GraphModule, example: Tensor, inner: Inner) -> Callable[..., Any]:
    """What runs the graph between our ops, which stay calls."""
    if inner == "eager" or not _inductor_can_compile(example.device):
        return module
    from torch._inductor.compile_fx import compile_fx

    with torch.no_grad():
        run: Any = compile_fx(module, [example])
    return lambda image: run(image)


def _inductor_can_compile(device: torch.device) -> bool:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    if device.type != "cpu":
        return True
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        reason = str(error).strip().splitlines()[0]
        _warn(f"the graph runs without Inductor, which needs a C++ compiler: {reason}")
        return False
    return True


# Refusals and warnings


def _refuse_autocast(gm: fx.GraphModule) -> None:
    """Autocast leaves no casts in the graph, so it would be lost."""
    entered = any(node.target is torch.amp.autocast_mode._enter_autocast for node in gm.graph.nodes)
    if entered or any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")):
        raise UsageError(
            "ouro compiles fp32 models, and autocast is on: run the compiled model outside of it"
        )


def _warn_of_gradients(example_inputs: Sequence[Any]) -> None:
    wanted = any(isinstance(one, Tensor) and one.requires_grad for one in example_inputs)
    if wanted and torch.is_grad_enabled():
        _warn("no gradients flow through a quantized graph: run it under torch.no_grad()")


def _warn(message: str) -> None:
    warnings.warn(f"ouro: {message}", stacklevel=3)
