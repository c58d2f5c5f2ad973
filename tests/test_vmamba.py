"""VMamba: keys, sizes, four orders of time, and compilation from end to end."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ouro_compiler as ouro
from ouro_compiler.compiler import prepare
from ouro_compiler.frontend.capture import capture
from ouro_compiler.graph import argument, value_of
from ouro_compiler.models.vmamba import ARCHITECTURES, SS2D, VMamba, VMambaConfig, vmamba_tiny
from ouro_compiler.recipes.planning import Plan
from tests.helpers import assert_close, randn
from tests.passes.graphs import assert_same, aten, calls, count, outputs
from tests.passes.graphs import ouro as ops

SMALL = VMambaConfig(img_size=16, embed_dim=16, depths=(1, 1), num_classes=5)
# What the first public models are: a gate, no MLP, several states, merged patches.
VANILLA = replace(
    SMALL, gate=True, conv_bias=True, mlp_ratio=0.0, d_state=4, ssm_ratio=2.0, patch_embed="v1",
    downsample="v1",
)  # fmt: skip
CONFIGS = {"v05_noz": SMALL, "v0": VANILLA, "v2 merging": replace(SMALL, downsample="v2")}
PARAMETERS = {
    "vmamba_micro": 166_378,
    "vmamba_tiny_s1l8": 30_249_064,
    "vmamba_small_s1l20": 49_012_840,
    "vmamba_base_s1l20": 86_614_504,
    "vmamba_tiny_s2l5": 30_705_832,
    "vmamba_small_s2l15": 50_147_752,
    "vmamba_base_s2l15": 88_557_800,
    "vmamba_tiny_v0": 22_893_448,
    "vmamba_small_v0": 44_417_416,
    "vmamba_base_v0": 76_254_056,
}
DIRECTIONS = [f"{layer}_{k}" for k in range(4) for layer in ("x_proj", "dt_projs")]


@lru_cache(maxsize=4)
def small(config: VMambaConfig = SMALL) -> VMamba:
    torch.manual_seed(0)
    return config.build().eval().requires_grad_(False)


@lru_cache(maxsize=4)
def prepared(config: VMambaConfig = SMALL) -> tuple[torch.fx.GraphModule, Plan]:
    gm = capture(small(config), randn(0, 2, 3, 16, 16))
    return gm, prepare(gm, ouro.W4A4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parameters_of_the_named_sizes(name: str) -> None:
    with torch.device("meta"):
        model = ARCHITECTURES[name].build()
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


def _shapes(config: VMambaConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {key: tuple(value.shape) for key, value in config.build().state_dict().items()}


def test_keys_and_shapes_of_v05() -> None:
    assert _shapes(replace(SMALL, depths=(1,))) == {
        "patch_embed.0.weight": (8, 3, 3, 3),
        "patch_embed.0.bias": (8,),
        "patch_embed.2.weight": (8,),
        "patch_embed.2.bias": (8,),
        "patch_embed.5.weight": (16, 8, 3, 3),
        "patch_embed.5.bias": (16,),
        "patch_embed.7.weight": (16,),
        "patch_embed.7.bias": (16,),
        "layers.0.blocks.0.norm.weight": (16,),
        "layers.0.blocks.0.norm.bias": (16,),
        "layers.0.blocks.0.op.x_proj_weight": (4, 3, 16),
        "layers.0.blocks.0.op.dt_projs_weight": (4, 16, 1),
        "layers.0.blocks.0.op.dt_projs_bias": (4, 16),
        "layers.0.blocks.0.op.A_logs": (64, 1),
        "layers.0.blocks.0.op.Ds": (64,),
        "layers.0.blocks.0.op.in_proj.weight": (16, 16),
        "layers.0.blocks.0.op.conv2d.weight": (16, 1, 3, 3),
        "layers.0.blocks.0.op.out_norm.weight": (16,),
        "layers.0.blocks.0.op.out_norm.bias": (16,),
        "layers.0.blocks.0.op.out_proj.weight": (16, 16),
        "layers.0.blocks.0.norm2.weight": (16,),
        "layers.0.blocks.0.norm2.bias": (16,),
        "layers.0.blocks.0.mlp.fc1.weight": (64, 16),
        "layers.0.blocks.0.mlp.fc1.bias": (64,),
        "layers.0.blocks.0.mlp.fc2.weight": (16, 64),
        "layers.0.blocks.0.mlp.fc2.bias": (16,),
        "classifier.norm.weight": (16,),
        "classifier.norm.bias": (16,),
        "classifier.head.weight": (5, 16),
        "classifier.head.bias": (5,),
    }


def test_keys_that_other_versions_have() -> None:
    base = _shapes(SMALL)
    assert base["layers.0.downsample.1.weight"] == (32, 16, 3, 3)
    assert base["layers.0.downsample.3.bias"] == (32,)
    assert _shapes(CONFIGS["v2 merging"])["layers.0.downsample.1.weight"] == (32, 16, 2, 2)
    vanilla = _shapes(VANILLA)
    assert vanilla["patch_embed.0.weight"] == (16, 3, 4, 4)
    assert vanilla["layers.0.downsample.reduction.weight"] == (32, 64)
    assert vanilla["layers.0.downsample.norm.weight"] == (64,)
    assert vanilla["layers.0.blocks.0.op.in_proj.weight"] == (64, 16)
    assert vanilla["layers.0.blocks.0.op.conv2d.bias"] == (32,)
    assert vanilla["layers.0.blocks.0.op.A_logs"] == (128, 4)
    assert not [key for key in vanilla if "mlp" in key or "norm2" in key or "patch_embed.5" in key]


def _by_cross_scan(block: SS2D, hidden: Tensor, grid: tuple[int, int]) -> Tensor:
    """The block as its paper draws it: four written-out orders, one scan of four groups."""
    rank, states, _ = block.parts
    x = block.in_proj(hidden).transpose(1, 2).unflatten(2, grid)
    u = ops.cross_scan(torch.nn.functional.silu(block.conv2d(x)))
    x_dbl = torch.einsum("bkdl,kcd->bkcl", u, block.x_proj_weight)
    delta, B, C = x_dbl.split([rank, states, states], dim=2)
    delta = torch.einsum("bkrl,kdr->bkdl", delta, block.dt_projs_weight)
    y = ops.selective_scan(
        u.flatten(1, 2), delta.flatten(1, 2), -torch.exp(block.A_logs), B.contiguous(),
        C.contiguous(), block.Ds, None, block.dt_projs_bias.flatten(), True,
    )  # fmt: skip
    merged = ops.cross_merge(y.unflatten(1, (4, -1)).contiguous(), *grid)
    return block.out_proj(block.out_norm(merged.transpose(1, 2)))


@pytest.mark.parametrize("grid", [(3, 5), (4, 4), (1, 6)])
def test_four_scans_are_the_cross_scan(grid: tuple[int, int]) -> None:
    torch.manual_seed(1)
    block = SS2D(replace(SMALL, d_state=3), 16).requires_grad_(False)
    block.Ds.uniform_(0.5, 1.5)
    block.A_logs.uniform_(-1.0, 1.0)
    hidden = randn(0, 2, grid[0] * grid[1], 16)
    assert_close(block(hidden, grid), _by_cross_scan(block, hidden, grid), 1e-5)


def test_an_odd_side_is_padded_before_merging() -> None:
    model = small(VANILLA)
    assert model(randn(0, 2, 3, 20, 28)).shape == (2, 5)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_capture_with_a_dynamic_batch(config: VMambaConfig) -> None:
    x = randn(0, 2, 3, 16, 16)
    model = small(config)
    gm = capture(model, x)
    assert count(gm, ops.selective_scan.default) == 8
    assert_same(outputs(gm, x), outputs(model, x), 1e-5)
    gm, _ = prepared(config)
    assert_same(outputs(gm, x), outputs(model, x), 1e-5)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_sites_of_a_block(config: VMambaConfig) -> None:
    gm, plan = prepared(config)
    mlp = ["mlp.fc1", "mlp.fc2"] if config.mlp_ratio else []
    expected = [
        f"layers.{stage}.blocks.0.{layer}"
        for stage in range(2)
        for layer in ["op.in_proj", *(f"op.{one}" for one in DIRECTIONS), "op.out_proj", *mlp]
    ]
    quantized = [row.name for row in plan.rows if row.status == "quantized"]
    assert [name for name in quantized if "downsample" not in name] == expected
    assert [row.name for row in plan.rows if row.kind == "scan"] == [
        f"layers.{stage}.blocks.0.op.selective_scan{suffix}"
        for stage in range(2)
        for suffix in ("", "_1", "_reverse", "_reverse_1")
    ]
    skipped = [row.name for row in plan.rows if row.kind == "linear" and row.status == "skipped"]
    assert skipped == ["classifier.head"]
    assert count(gm, aten.flip.default, aten.conv1d.default, aten.einsum.default) == 0


def test_each_direction_is_a_site_in_its_own_order() -> None:
    gm, plan = prepared()
    sites = {site.name: site for site in plan.sites}
    tokens = []
    for order in range(4):
        site = sites[f"layers.0.blocks.0.op.x_proj_{order}.input"]
        assert site.reverse == (order >= 2)
        assert sites[f"layers.0.blocks.0.op.dt_projs_{order}.input"].reverse == (order >= 2)
        tokens.append(site.source)
    assert tokens[0] is tokens[2]  # row-major, from either end
    assert tokens[1] is tokens[3]  # column-major
    assert tokens[0] is not tokens[1]
    scans = calls(gm, ops.selective_scan.default)
    assert [argument(scan, "reverse") for scan in scans] == [False, False, True, True] * 2
    assert all(argument(scan, "delta_bias") is None for scan in scans)  # it is in dt_projs


def test_every_stage_has_its_own_length() -> None:
    _, plan = prepared()
    lengths = {
        site.layer: value_of(site.source).shape[1] for site in plan.sites if not site.reverse
    }
    assert lengths["layers.0.blocks.0.op.in_proj"] == 16
    assert lengths["layers.1.blocks.0.op.in_proj"] == 4
    assert all(isinstance(length, int) for length in lengths.values())


@pytest.mark.parametrize("config", [SMALL, VANILLA], ids=["v05_noz", "v0"])
def test_compiled_saved_and_loaded(config: VMambaConfig, tmp_path: Path) -> None:
    config = replace(config, depths=(1,))
    images = randn(1, 4, 3, 16, 16)
    compiled = ouro.compile(small(config), images[:2], ouro.W4A4, calibration=images)
    expected, found = small(config)(images), compiled(images)
    assert (expected - found).norm() < 0.5 * expected.norm()
    path = tmp_path / "vmamba.pt2"
    compiled.save(path)
    assert torch.equal(ouro.load(path)(images), found)


def test_a_factory_takes_changes() -> None:
    with torch.device("meta"):
        model = vmamba_tiny(num_classes=7)
    assert model.config == replace(ARCHITECTURES["vmamba_tiny_s1l8"], num_classes=7)


def test_gradients_reach_every_parameter() -> None:
    torch.manual_seed(0)
    model = SMALL.build()
    model(randn(0, 2, 3, 16, 16)).square().sum().backward()
    missing = [name for name, one in model.named_parameters() if one.grad is None]
    assert missing == []


class StackedAtTheTop(nn.Module):
    """Layers whose weights are parameters of the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.mixing = nn.Parameter(randn(0, 6, 6))
        self.value_weight = nn.Parameter(randn(1, 2, 6, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)
        x = F.linear(F.linear(x, self.value_weight[1]), self.mixing)
        return F.linear(x, self.value_weight[0]).mean(1)


def test_layers_are_never_called_like_a_parameter() -> None:
    """What a layer is given at compilation lives under its name, so that must be free."""
    images = randn(2, 4, 6, 3, 3)
    compiled = ouro.compile(StackedAtTheTop(), images[:2], ouro.W8A8, calibration=images)
    names = [row["name"] for row in compiled.report["layers"]["rows"]]
    assert names == ["value_1", "mixing_layer", "value_0"]
