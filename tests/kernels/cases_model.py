"""Whole compiled models on generated kernels: what the references give."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, fx

import ouro_compiler as ouro
from ouro_compiler.config import QuantConfig
from ouro_compiler.evaluation import snr_db
from ouro_compiler.graph import is_op
from ouro_compiler.kernels import launch
from ouro_compiler.kernels.cuda import IMPLEMENTATIONS
from ouro_compiler.kernels.dispatch import ReferenceWarning, register
from ouro_compiler.ops import QUANTIZERS
from ouro_compiler.ops.causal_conv1d import causal_conv1d_ref
from ouro_compiler.runtime.folding import call_directly, fold_constants
from tests.helpers import randn
from tests.kernels.inputs import on
from tests.models import compiled_vim, images

CONFIGS = {
    "w4a4": ouro.W4A4,
    "w8a8 none": dataclasses.replace(ouro.W8A8, ssm="none"),
    "w4a4 none fp16": dataclasses.replace(ouro.W4A4, ssm="none", activation_dtype="fp16"),
}


@contextmanager
def kernels_on(device: str) -> Iterator[None]:
    """Kernels also serve the CPU where that is the device: they are interpreted."""
    if device != "cpu":
        yield
        return
    library = torch.library.Library("ouro", "IMPL")
    register("CPU", IMPLEMENTATIONS, library)
    try:
        yield
    finally:
        library._destroy()


class Codes(fx.Interpreter):
    """Runs a graph and keeps the codes of every quantizer."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.found: list[Tensor] = []

    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        if is_op(n, *QUANTIZERS):
            self.found.append(value[0].cpu())
        return value


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=[pytest.mark.slow] if config.activations.outlier_bits == 16 else []
        )
        for name, config in CONFIGS.items()
    ],
)
def test_model(name: str, device: str) -> None:
    config: QuantConfig = CONFIGS[name]
    model = compiled_vim(config)
    batch = images(2, seed=7)
    reference = Codes(model.graph_module)
    expected = reference.run(batch)
    loaded = launch.load_kernel.cache_info()
    with kernels_on(device), warnings.catch_warnings():
        warnings.simplefilter("error", ReferenceWarning)
        codes = Codes(model.to(device).graph_module)
        found = codes.run(batch.to(device)).cpu()
    model.to("cpu")
    ran = launch.load_kernel.cache_info()
    assert ran.hits + ran.misses - loaded.hits - loaded.misses >= 14, "the references ran"
    # The first quantizers see the same values. Later a code may flip where two roundings of one
    # value fall on both sides of a tie: a few in ten thousand, by one step.
    total = sum(one.numel() for one in reference.found)
    differences = [
        (ours.int() - theirs.int()).abs()
        for ours, theirs in zip(codes.found, reference.found, strict=True)
    ]
    assert len(differences) == (12 if config.ssm == "params" else 6)
    assert sum(int((one > 0).sum()) for one in differences) <= 2e-3 * total
    assert snr_db(expected, found) > 30


@pytest.mark.slow  # interpreted, it takes half a minute
def test_direct_calls_of_a_folded_graph_give_its_bits(device: str) -> None:
    """What a compiled model's CUDA graph captures."""
    model = compiled_vim()
    batch = images(1, seed=3).to(device)
    with kernels_on(device), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", ReferenceWarning)
        graph = model.to(device).graph_module
        found = call_directly(fold_constants(graph), "cuda")(batch)
        expected = graph(batch)
    model.to("cpu")
    assert torch.equal(found, expected)


def test_what_no_kernel_takes_runs_the_reference_with_a_warning(device: str) -> None:
    x, weight = randn(1, 2, 6, 5).double(), randn(2, 6, 4).double()
    with kernels_on(device), pytest.warns(ReferenceWarning, match=r"causal_conv1d.*torch\.float64"):
        found = torch.ops.ouro.causal_conv1d(*on(device, x, weight))
    assert torch.equal(found.cpu(), causal_conv1d_ref(x, weight))
