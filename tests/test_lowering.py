"""Lowering: rules pack or refuse with a reason; fp16 storage loses nothing it must keep."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import ouro_compiler as ouro
from ouro_compiler.graph import add_constant, get_constant, is_op
from ouro_compiler.kernels.cuda import IMPLEMENTATIONS
from ouro_compiler.kernels.launch import record_launches
from ouro_compiler.kernels.plan import distinct_launches, plan_kernels, plan_launches
from ouro_compiler.lowering import weights  # noqa: F401  (registers its rules)
from ouro_compiler.lowering.lower import lower
from ouro_compiler.lowering.registry import RULES, LoweringRule, register
from ouro_compiler.lowering.storage import store_as_half
from ouro_compiler.report import LayerRow
from ouro_compiler.runtime.compiled_model import CompiledModel
from tests.models import images, small_vim

WEIGHT = torch.ops.ouro.dequantize_weight.default


def weight_graph(codes: Tensor, bits: int) -> fx.GraphModule:
    """x * dequantize_weight(codes), for a layer called `layer`."""
    gm = fx.GraphModule(nn.Module(), fx.Graph())
    x = gm.graph.placeholder("x")
    x.meta["val"] = torch.empty(1)
    qweight = add_constant(gm, "layer.qweight", codes)
    scale = add_constant(gm, "layer.weight_scale", torch.full((len(codes),), 0.5))
    node = gm.graph.call_function(WEIGHT, (qweight, scale, None, bits, codes.shape[1]))
    node.meta["ouro_layer"] = "layer"
    gm.graph.output(gm.graph.call_function(torch.ops.aten.mul.Tensor, (x, node)))
    gm.recompile()
    return gm


@pytest.mark.parametrize(("bits", "packed"), [(4, True), (6, False), (8, False)])
def test_codes_of_four_bits_are_packed(bits: int, packed: bool) -> None:
    limit = 2 ** (bits - 1) - 1
    codes = torch.arange(-limit, limit + 1, dtype=torch.int8)[None].repeat(2, 1)
    gm = weight_graph(codes, bits)
    before = gm(torch.ones(()))
    lower(gm, [])
    held = gm.get_buffer("layer.qweight")
    assert held.dtype == (torch.uint8 if packed else torch.int8)
    assert held.shape[1] == ((codes.shape[1] + 1) // 2 if packed else codes.shape[1])
    assert gm.get_buffer("layer.weight_scale").dtype == torch.float16
    assert torch.equal(gm(torch.ones(())), before)


def test_codes_that_are_no_constant_are_refused() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(1, 3)
    node = graph.call_function(WEIGHT, (x, x, None, 4, 3))
    graph.output(node)
    gm = fx.GraphModule(nn.Module(), graph)
    assert RULES[WEIGHT].supports(gm, node) == (
        "its quantized weight is not a constant of int8 codes"
    )
    node.meta["ouro_layer"] = "layer"
    row = LayerRow(name="layer", kind="linear", status="quantized", selected=True)
    lower(gm, [row])
    assert row.status == "skipped"
    assert row.reason == "its quantized weight is not a constant of int8 codes"


def test_a_selected_layer_that_no_pass_fused_is_a_skipped_row() -> None:
    row = LayerRow(name="other", kind="linear", status="quantized", selected=True)
    lower(weight_graph(torch.zeros(2, 4, dtype=torch.int8), 4), [row])
    assert row.status == "skipped"
    assert row.reason == "no pass turned it into an integer op"


def test_one_rule_an_op() -> None:
    with pytest.raises(ValueError, match="already has"):
        register(LoweringRule(target=WEIGHT, supports=lambda *_: None, lower=lambda *_: None))


def test_storage_casts_back_and_keeps_what_half_cannot_hold() -> None:
    gm = fx.GraphModule(nn.Module(), fx.Graph())
    x = gm.graph.placeholder("x")
    for name, value in (
        ("bias", torch.tensor([1.0, 2.5])),
        ("huge", torch.tensor([1e6])),
        ("site.inlier_scale", torch.tensor([1e-7])),
        ("other.inlier_scale", torch.tensor([0.5])),
    ):
        x = gm.graph.call_function(torch.ops.aten.add.Tensor, (x, add_constant(gm, name, value)))
    gm.graph.output(x)
    gm.recompile()
    before = gm(torch.zeros(1))
    assert sorted(store_as_half(gm)) == ["huge", "site.inlier_scale"]
    gm.recompile()
    assert gm.get_buffer("bias").dtype == gm.get_buffer("other.inlier_scale").dtype == torch.half
    assert gm.get_buffer("huge").dtype == torch.float32
    assert torch.equal(gm(torch.zeros(1)), before)
    casts = [node for node in gm.graph.nodes if is_op(node, torch.ops.aten.to.dtype)]
    assert {str(node.args[0].target) for node in casts} == {"bias", "other.inlier_scale"}  # type: ignore[union-attr]
    assert all(get_constant(gm, node.args[0]) is not None for node in casts)


# --- kernels


def test_report_names_the_kernel_of_every_op() -> None:
    rows = {target: compiled_for(target).report["kernels"] for target in ("cpu", "cuda")}
    nodes = {target: sum(row["nodes"] for row in rows[target]) for target in rows}
    assert nodes["cpu"] == nodes["cuda"] == 25
    reason = "no kernel is generated for this operator"
    without = {
        target: {row["op"]: row["reason"] for row in rows[target] if row["kernel"] == "reference"}
        for target in rows
    }
    assert without["cuda"] == {"dequantize_weight": reason}
    assert without["cpu"] == {}


def test_layers_name_their_kernel() -> None:
    rows = {row["name"]: row for row in compiled_for("cuda").report["layers"]["rows"]}
    assert rows["layers.0.mixer.in_proj"]["kernel"] == "linear_dynamic_outlier int4 o8"
    assert rows["layers.0.mixer.dt_proj_b"]["kernel"].endswith("int4 o8 reverse bias")
    scan = rows["layers.0.mixer.selective_scan_reverse"]["kernel"]
    assert scan == "selective_scan_dynamic_outlier 4/8 asymmetric reverse"
    assert rows["head"]["kernel"] is None


def test_target_changes_nothing_else() -> None:
    cpu, cuda = (compiled_for(target) for target in ("cpu", "cuda"))
    batch = images(3, seed=9)
    assert torch.equal(cpu(batch), cuda(batch))
    assert cpu.manifest["constants_sha256"] == cuda.manifest["constants_sha256"]


@lru_cache
def compiled_for(target: str) -> CompiledModel:
    config = ouro.W4A4.with_setting("activation_dtype=fp32")  # by default the target decides
    return ouro.compile(small_vim(), images(2), config, calibration=images(), target=target)  # type: ignore[arg-type]


def test_plan_of_a_graph() -> None:
    gm = compiled_for("cuda").graph_module
    plans = plan_kernels(gm, "cuda")
    assert [plan.op for plan in plans] == [plan.op for plan in plan_kernels(gm, "cuda", batch=5)]
    specs = [[launch.spec for launch in plan.launches] for plan in plans]
    again = [
        [launch.spec for launch in plan.launches] for plan in plan_kernels(gm, "cuda", batch=5)
    ]
    assert specs == again, "kernels do not depend on the batch"
    linears = [plan for plan in plans if plan.op == "linear_dynamic_outlier"]
    assert {len(plan.launches) for plan in linears} == {1}
    distinct = distinct_launches(plans)
    assert len(distinct) < sum(len(plan.launches) for plan in plans)
    assert {launch.spec for launch in distinct} == {spec for one in specs for spec in one}
    every = plan_launches(gm, "cuda")
    busy = {launch.spec for launch in every} - {launch.spec for launch in distinct}
    assert {spec.template.value for spec in busy} == {"selective_scan_dynamic_outlier"}
    assert {spec["SHARE"] for spec in busy} == {1}, "a lane has a channel where there are many"
    assert len(every) == len(distinct) + len(busy)


def test_a_copy_is_a_row_with_its_reason() -> None:
    """A product whose residual is a transposed tensor."""
    with FakeTensorMode(), record_launches() as recording:
        IMPLEMENTATIONS["linear_dynamic_outlier"].kernel(
            torch.empty(2, 4, 6, dtype=torch.int8),
            torch.empty(4),
            torch.empty(2, 4),
            torch.empty(2, 1, 6, dtype=torch.uint8),
            None,
            torch.empty(5, 6, dtype=torch.int8),
            torch.empty(5),
            None,
            torch.empty(2, 5, 4).transpose(1, 2),
            *("none", 4, 8, 10, False),
        )
    assert recording.copies == ["residual is copied: it is not contiguous"]
