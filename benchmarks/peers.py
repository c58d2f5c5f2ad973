"""What others compute the same models with: mamba_ssm's reference scan, Inductor, torchao."""

from __future__ import annotations

import ast
import copy
import importlib.util
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ouro_compiler.frontend.capture import export
from ouro_compiler.graph import is_op
from ouro_compiler.kernels.dispatch import Implementation, function_on, register
from ouro_compiler.ops.causal_conv1d import causal_conv1d_ref
from ouro_compiler.ops.norm import add_norm_ref

Model = Callable[[Tensor], Any]
PLAIN: dict[str, Callable[..., Any]] = {
    "causal_conv1d": causal_conv1d_ref,
    "add_norm": add_norm_ref,
}


class UnavailableError(Exception):
    """A variant that cannot run here; the message says why in one sentence."""


def mamba_scan() -> Callable[..., Tensor]:
    """`ouro::selective_scan` as mamba_ssm's own `selective_scan_ref` computes it.

    The function's text is taken out of the installed file, whose import needs CUDA. mamba_ssm
    knows one direction: for the other its operands and result are flipped. Raises UnavailableError.
    """
    spec = importlib.util.find_spec("mamba_ssm")
    if spec is None or not spec.submodule_search_locations:
        raise UnavailableError("mamba_ssm is not installed")
    try:
        from einops import rearrange, repeat
    except ImportError as error:
        raise UnavailableError("einops is not installed") from error
    path = Path(next(iter(spec.submodule_search_locations)), "ops", "selective_scan_interface.py")
    text = path.read_text()
    wanted = "selective_scan_ref"
    found = [
        one
        for one in ast.parse(text).body
        if isinstance(one, ast.FunctionDef) and one.name == wanted
    ]
    scope: dict[str, Any] = {"torch": torch, "F": F, "rearrange": rearrange, "repeat": repeat}
    exec(ast.get_source_segment(text, found[0]) or "", scope)
    reference = scope[wanted]

    def scan(
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = False,
        reverse: bool = False,
    ) -> Tensor:
        if reverse:
            u, delta, B, C = (one.flip(-1) for one in (u, delta, B, C))
            z = None if z is None else z.flip(-1)
        y = reference(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
        return y.flip(-1) if reverse else y

    return scan


@contextmanager
def operators_by(kernels: Mapping[str, Callable[..., Any]], device: str = "cpu") -> Iterator[None]:
    """Inside, `ouro` operators on a kind of device are these, by name."""
    library = torch.library.Library("ouro", "IMPL")
    found = {name: Implementation(one, one, lambda *_, **__: None) for name, one in kernels.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Warning only once for all operators")
        register(device.upper(), found, library)
    try:
        yield
    finally:
        library._destroy()


@contextmanager
def plain_operators(**others: Callable[..., Any]) -> Iterator[None]:
    """Inside, models use plain PyTorch for `ouro` ops but the scan, and `others` by name.

    So a compiler sees convolutions and norms that it can fuse, and an exporter what it knows.
    """
    plain = {**PLAIN, **others}
    space = torch.ops.ouro
    before = {name: getattr(space, name) for name in plain}
    for name, function in plain.items():
        setattr(space, name, function)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(space, name, function)


def plain_graph(model: nn.Module, images: Tensor, **others: Callable[..., Any]) -> fx.GraphModule:
    """The model's graph for this batch size, in plain operators and scans."""
    with plain_operators(**others):
        program = export(model, images, static=True)
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    return module


def without_references(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph where what has no kernel on a CPU is plain PyTorch, for a compiler."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    graph.set_codegen(module.graph._codegen)
    for node in graph.nodes:
        for name, function in PLAIN.items():
            if is_op(node, getattr(torch.ops.ouro, name).default):
                node.target = node.target if function_on("CPU", name) else function
    return fx.GraphModule(module, graph)


def inductor(module: nn.Module, images: Tensor) -> Model:
    """torch.compile for this batch size, weights folded and packed as for inference."""
    compiled = torch.compile(module, dynamic=False)
    # As an option of torch.compile it would not reach all of what compiles.
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        compiled(images)
    return compiled


def inductor_fp32(model: nn.Module, images: Tensor) -> Model:
    """The model compiled by Inductor around our scan."""
    return inductor(plain_graph(model, images), images)


def inductor_bf16(model: nn.Module, images: Tensor) -> Model:
    """The same with weights and activations in bf16."""
    half = images.bfloat16()
    compiled = inductor(plain_graph(copy.deepcopy(model).bfloat16(), half), half)
    return lambda given: compiled(given.bfloat16()).float()


def inductor_max_autotune(model: nn.Module, images: Tensor) -> Model:
    """The model compiled by Inductor around our scan, kernels and CUDA graphs tuned for speed."""
    compiled = torch.compile(plain_graph(model, images), dynamic=False, mode="max-autotune")
    return lambda given: compiled(given).clone()  # its CUDA graphs write outputs again


def torchao_int8(model: nn.Module, images: Tensor) -> Model:
    """torchao's dynamic int8 activations and int8 weights in every nn.Linear, by Inductor."""
    del images
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    except ImportError as error:
        raise UnavailableError("torchao is not installed") from error
    quantized = copy.deepcopy(model)
    quantize_(quantized, Int8DynamicActivationInt8WeightConfig())
    return torch.compile(quantized, dynamic=False)


def inductor_int8(model: nn.Module, images: Tensor) -> Model:
    """Static int8 by torchao's X86InductorQuantizer, calibrated on the images, by Inductor."""
    try:
        from torchao.quantization.pt2e import move_exported_model_to_eval
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
        from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
            X86InductorQuantizer,
            get_default_x86_inductor_quantization_config,
        )
    except ImportError as error:
        raise UnavailableError("torchao is not installed, or has no such quantizer") from error
    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(plain_graph(model, images), quantizer)
    prepared(images)
    converted = convert_pt2e(prepared)
    move_exported_model_to_eval(converted)
    return inductor(converted, images)
