"""VMamba's orders read by index, and merged by one op: the same bits with no copies of maps."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import ouro_compiler as ouro
from ouro_compiler.export.onnx import export_onnx
from ouro_compiler.graph import value_of
from ouro_compiler.kernels.cpu import IMPLEMENTATIONS
from ouro_compiler.runtime.folding import fold_constants
from ouro_compiler.runtime.record import Call, record_graph
from ouro_compiler.runtime.schedule import Schedule
from tests.helpers import randn
from tests.passes.graphs import aten, calls, count
from tests.passes.graphs import ouro as ops
from tests.passes.test_vmamba_block import DIM, SIDES, PublicBlock
from tests.test_vmamba import SMALL, VANILLA

ONE_BLOCK = replace(SMALL, depths=(1,))
GATED = replace(VANILLA, depths=(1,), d_state=1)
IMAGES = randn(1, 4, 3, 16, 24)  # maps of 4 x 6 tokens
MERGE, QUANTIZE = ops.cross_merge_norm_quantize.default, ops.quantize_dynamic_outlier.default
SCANS = (ops.selective_scan.default, ops.selective_scan_dynamic_outlier.default)


def compiled(model: nn.Module, images: Tensor, **options: Any) -> tuple[Any, dict[str, Any]]:
    """A compiled model, and copies of its graph after every pass."""
    graphs: dict[str, fx.GraphModule] = {}

    def keep(name: str, changed: bool, gm: fx.GraphModule) -> None:
        del changed
        graphs[name] = copy.deepcopy(gm)

    config = replace(ouro.W4A4, **options)
    return ouro.compile(model, images[:2], config, calibration=images, on_pass=keep), graphs


@lru_cache
def small(ssm: str = "none", gated: bool = False) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    model = (GATED if gated else ONE_BLOCK).build().eval().requires_grad_(False)
    return compiled(model, IMAGES, ssm=ssm)


def read_maps(gm: fx.GraphModule) -> tuple[int, int]:
    """How many quantizers, and how many scans, read a map."""
    found = []
    for targets in ((QUANTIZE,), SCANS):
        readers = [node for target in targets for node in calls(gm, target)]
        found.append(sum(value_of(node.args[0]).dim() == 4 for node in readers))
    return found[0], found[1]


@pytest.mark.parametrize("ssm", ["none", pytest.param("params", marks=pytest.mark.slow)])
def test_the_same_bits_without_copies(ssm: str) -> None:
    model, graphs = small(ssm)
    gm = model.graph_module
    assert count(gm, MERGE) == 1
    assert read_maps(gm) == (2, 2)
    with torch.no_grad():
        merged = graphs["fuse_cross_merge"](IMAGES)
        assert torch.equal(merged, graphs["fuse_quantize_prologue"](IMAGES))
        last = graphs["read_maps_by_index"](IMAGES)
        assert torch.equal(last, graphs["fuse_dequantize_scan"](IMAGES))


def test_a_size_that_comes_again_gives_the_same_bits() -> None:
    model, _ = small()
    for batch in (1, 3):
        first = model(IMAGES[:batch])
        assert all(torch.equal(model(IMAGES[:batch]), first) for _ in range(2))


def test_what_is_called_besides_kernels() -> None:
    """On both devices neither reshapes nor sums; kernels copy no operand."""
    gm = fold_constants(small()[0].graph_module)
    others = {
        *(aten.conv2d.default, aten.conv2d.padding, aten.silu.default, aten.gelu.default),
        *(aten.linear.default, aten.mean.dim, ops.add_norm.default),
    }
    steps = Schedule(gm, IMAGES).steps
    assert {step.function for step in steps if isinstance(step, Call)} <= others
    record = record_graph(gm, IMAGES, IMPLEMENTATIONS)
    assert {step.function for step in record.steps if isinstance(step, Call)} <= others
    kinds = [getattr(step, "spec", None) for step in steps]
    labels = [spec.label.split(" of ")[-1].split()[0] for spec in kinds if spec is not None]
    assert labels.count("cross_merge_norm_quantize") == 1


def test_a_gate_behind_the_norm_keeps_the_sums() -> None:
    gm = small(gated=True)[0].graph_module
    assert count(gm, MERGE) == 0
    assert count(gm, ops.add_norm.default) > 0
    assert read_maps(gm) == (2, 2)


@pytest.mark.parametrize(
    ("channel_first", "written_out"),
    [(False, True), pytest.param(True, False, marks=pytest.mark.slow)],
    ids=["channel last, written out", "channel first, ops"],
)
def test_public_blocks(channel_first: bool, written_out: bool) -> None:
    torch.manual_seed(0)
    block = PublicBlock(channel_first, 2, written_out).eval().requires_grad_(False)
    images = randn(2, 4, DIM, *SIDES)
    model, graphs = compiled(block, images, ssm="none")
    gm = model.graph_module
    assert read_maps(gm) == (2, 2)
    assert count(gm, MERGE) == 1
    assert count(gm, ops.add_norm.default) == 0
    with torch.no_grad():
        before = graphs["fuse_quantize_prologue"](images)
        assert torch.equal(graphs["fuse_cross_merge"](images), before)
        before = graphs["fuse_dequantize_scan"](images)
        assert torch.equal(graphs["read_maps_by_index"](images), before)
        floating = block(images)
        assert (model(images) - floating).norm() < 0.5 * floating.norm()


def test_onnx(tmp_path: Path) -> None:
    made = export_onnx(small()[0], tmp_path / "m.onnx")
    assert made.scans == 4
    assert made.snr_db is not None
    assert made.snr_db > 30
