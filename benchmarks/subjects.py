"""What suites "cpu" and "gpu" share: a model, ways to run it, and when a row may have numbers."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

import ouro_compiler as ouro
from benchmarks import checks, peers
from benchmarks.peers import Model, UnavailableError
from ouro_compiler.compiler import prepare
from ouro_compiler.config import QuantConfig
from ouro_compiler.data import noise_images
from ouro_compiler.frontend.capture import capture
from ouro_compiler.frontend.detect import ARCHITECTURES
from ouro_compiler.frontend.preprocessing import expected_preprocessing
from ouro_compiler.graph import is_op
from ouro_compiler.kernels.dispatch import function_on
from ouro_compiler.runtime.compiled_model import CompiledModel

_STATES_SHARE = 0.1  # of the logits, by L2 norm
_DOUBLINGS = 12


class Subject:
    """A model with fixed random weights, its inputs, and what its variants share.

    images: how many calibrate it. device: where it runs; it is compiled on the CPU. artefacts: a
    folder where compiled models are kept, and looked for.
    """

    def __init__(
        self, name: str, images: int, device: str = "cpu", artefacts: Path | None = None
    ) -> None:
        torch.manual_seed(0)
        self.name, self.device, self.artefacts = name, torch.device(device), artefacts
        config = ARCHITECTURES[name]
        self.model = config.build().eval().requires_grad_(False)  # on the CPU, in fp32
        self.preprocessing = expected_preprocessing(config)
        self.calibration = noise_images(self.preprocessing, images, 0)
        make_states_matter(self.model, self.images(1).cpu())
        self.compiled = cache(self._compile)
        self.prepared = cache(self._prepared)
        self.expected = cache(self._expected)

    def images(self, batch: int) -> Tensor:
        """Noise, of another seed than the calibration's."""
        return next(iter(noise_images(self.preprocessing, batch, 1).batches(batch))).to(self.device)

    def placed(self, dtype: torch.dtype) -> nn.Module:
        """A copy of the model on the device."""
        return copy.deepcopy(self.model).to(self.device, dtype)

    @cached_property
    def graph(self) -> fx.GraphModule:
        """The captured, normalised graph in floating point, on the CPU."""
        return self.prepared(torch.float32)

    def _prepared(self, dtype: torch.dtype) -> fx.GraphModule:
        """The captured, normalised graph of the model in a dtype, on the CPU."""
        model = copy.deepcopy(self.model).to(dtype)
        module = capture(model, self.images(1).to("cpu", dtype))
        prepare(module, ouro.W4A4)
        return module

    @property
    def scans(self) -> int:
        """Selective scans of the model."""
        scan = torch.ops.ouro.selective_scan.default
        return sum(is_op(node, scan) for node in self.graph.graph.nodes)

    def _compile(self, config: QuantConfig) -> tuple[CompiledModel, str]:
        """The compiled model on the CPU, and what was found about its kernels on the device."""
        weights, activations = config.weights.bits, config.activations.inlier_bits
        path = self.artefacts and (
            self.artefacts / f"{self.name}_w{weights}a{activations}_{config.ssm}.pt2"
        )
        if path and path.exists():
            compiled = ouro.load(path)
        else:
            example = self.images(1).cpu()
            compiled = ouro.compile(self.model, example, config, calibration=self.calibration)
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)
                compiled.save(path)
        return compiled, checks.check_operators(self.on_device(compiled), self.images(1))

    def on_device(self, compiled: CompiledModel) -> fx.GraphModule:
        """The graph of a compiled model; a copy where the device is another."""
        graph = compiled.graph_module
        return graph if self.device.type == "cpu" else copy.deepcopy(graph).to(self.device)

    def _expected(self, batch: int) -> Tensor:
        """Logits in fp32 with mamba_ssm's scan where that is installed, and on a GPU references.

        Raises WrongError where a GPU's are not those of the CPU.
        """
        kernels: dict[str, Callable[..., Any]] = {}
        if self.device.type == "cuda":
            found = checks.implementations(self.device)
            kernels.update({name: one.reference for name, one in found.items()})
        with suppress(UnavailableError):
            kernels["selective_scan"] = peers.mamba_scan()
        images = self.images(batch)
        with torch.inference_mode(), ExitStack() as stack:
            if kernels:
                stack.enter_context(peers.operators_by(kernels, self.device.type))
            if self.device.type == "cpu":
                return self.model(images)
            stack.enter_context(torch.backends.cudnn.flags(enabled=True, allow_tf32=False))
            logits = self.placed(torch.float32)(images)
            checks.check_fp32(logits[:1].cpu(), self.model(images[:1].cpu()))
            return logits


def make_states_matter(model: nn.Module, images: Tensor) -> None:
    """Double what makes scans' operands (x_proj) until logits depend on the states.

    With fresh random weights they hardly do, and a check of logits would let a wrong scan pass.
    """
    parameters = [one for name, one in model.named_parameters() if "x_proj" in name]
    scan = function_on("CPU", "selective_scan")
    assert scan is not None

    def without_states(
        u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *rest: Any
    ) -> Any:
        return scan(u, delta, A, B, torch.zeros_like(C), *rest)

    with torch.no_grad():
        for _ in range(_DOUBLINGS if parameters else 0):
            logits = model(images)
            with peers.operators_by({"selective_scan": without_states}):
                error = (model(images) - logits).norm() / logits.norm()
            if error >= _STATES_SHARE:
                break
            for one in parameters:
                one.mul_(2)


@dataclass
class Built:
    """A variant ready to run: images -> logits, how it was made, where its turns run.

    module: what holds its weights. on_cpu: the same artefact's logits of images on the CPU.
    """

    call: Model
    note: str = ""
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    module: nn.Module | None = None
    on_cpu: Model | None = None


@dataclass(frozen=True)
class Variant:
    """A way to run a model. kind: fp32, fp16, bf16 or integer, which says how it is checked."""

    kind: str
    build: Callable[[Subject, Tensor], Built]


def check_built(subject: Subject, batch: int, variant: Variant, built: Built) -> str:
    """What a row says of a variant's logits. Raises WrongError."""
    images, expected = subject.images(batch), subject.expected(batch)
    with built.context():
        found = built.call(images).float().clone()
        if variant.kind == "fp32":
            return checks.check_fp32(found, expected)
        if variant.kind in checks.HALF_TOLERANCE:
            return checks.check_half(found, expected, variant.kind)
        said = checks.check_integer(found, built.call(images).float(), expected)
    if built.on_cpu is not None:
        said += ", " + checks.check_same_artefact(found[:1].cpu(), built.on_cpu(images[:1].cpu()))
    return said


def sentence(error: Exception) -> str:
    """An exception in one line without paths."""
    if isinstance(error, UnavailableError | checks.WrongError):
        return str(error)
    lines = str(error).strip().splitlines() or ["no message"]
    text = re.sub(r"(/[\w.+-]+){2,}", "...", lines[0])
    return f"{type(error).__name__}: {text[:160]}"
