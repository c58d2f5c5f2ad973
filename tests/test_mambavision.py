"""MambaVision: keys, sizes, windows, the doubled dt bias, and compilation from end to end."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import ouro_compiler as ouro
from ouro_compiler.compiler import prepare
from ouro_compiler.frontend.capture import capture
from ouro_compiler.graph import argument, get_constant, value_of
from ouro_compiler.models.mambavision import (
    ARCHITECTURES,
    HybridBlock,
    MambaVision,
    MambaVisionConfig,
    MambaVisionMixer,
    mambavision_tiny,
)
from ouro_compiler.passes.fold_batch_norm import fold_batch_norm
from ouro_compiler.recipes.planning import Plan
from tests.helpers import assert_close, mamba_selective_scan_ref, randn
from tests.passes.graphs import assert_same, aten, calls, count, outputs, run
from tests.passes.graphs import ouro as ops

# 64 pixels: 4x4 tokens in stage 2, in four windows, and 2x2 in stage 3, in one.
SMALL = MambaVisionConfig(
    img_size=64, stem_dim=4, embed_dim=4, depths=(1, 1, 2, 2), heads=(1, 1, 2, 2),
    windows=(8, 8, 2, 2), d_state=4, layer_scale=True, num_classes=5,
)  # fmt: skip
PARAMETERS = {
    "mambavision_micro": 148_162,
    "mambavision_tiny": 31_794_248,
    "mambavision_tiny2": 35_104_008,
    "mambavision_small": 50_140_584,
    "mambavision_base": 97_685_288,
    "mambavision_large": 227_961_048,
    "mambavision_large2": 241_554_824,
    "mambavision_large2_512": 241_554_824,
    "mambavision_large3_256": 739_570_472,
    "mambavision_large3_512": 739_570_472,
}
MIXER = ["mixer.in_proj", "mixer.x_proj", "mixer.dt_proj", "mixer.out_proj", "mlp.fc1", "mlp.fc2"]
ATTENTION = ["mixer.qkv", "mixer.proj", "mlp.fc1", "mlp.fc2"]


@lru_cache(maxsize=4)
def small(config: MambaVisionConfig = SMALL) -> MambaVision:
    torch.manual_seed(0)
    model = config.build().eval().requires_grad_(False)
    for name, value in model.state_dict().items():
        if "gamma" in name or "running_var" in name:
            value.uniform_(0.5, 1.5)
        elif "running_mean" in name:
            value.normal_(0.0, 0.2)
    return model


@lru_cache(maxsize=2)
def prepared(config: MambaVisionConfig = SMALL) -> tuple[torch.fx.GraphModule, Plan]:
    gm = capture(small(config), randn(0, 2, 3, 64, 64))
    return gm, prepare(gm, ouro.W4A4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parameters_of_the_named_sizes(name: str) -> None:
    with torch.device("meta"):
        model = ARCHITECTURES[name].build()
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


def test_blocks_that_attend() -> None:
    with torch.device("meta"):
        model = mambavision_tiny(depths=(1, 3, 8, 5))
    kinds = [
        "".join(type(block.mixer).__name__[0] for block in model.levels[s].blocks) for s in (2, 3)
    ]
    assert kinds == ["MMMMAAAA", "MMMAA"]


def test_keys_and_shapes() -> None:
    state = {key: tuple(value.shape) for key, value in small().state_dict().items()}
    norms = ("weight", "bias", "running_mean", "running_var")
    assert {key: shape for key, shape in state.items() if not key.startswith("levels")} == {
        "patch_embed.conv_down.0.weight": (4, 3, 3, 3),
        "patch_embed.conv_down.3.weight": (4, 4, 3, 3),
        **{f"patch_embed.conv_down.{at}.{one}": (4,) for at in (1, 4) for one in norms},
        **{f"patch_embed.conv_down.{at}.num_batches_tracked": () for at in (1, 4)},
        **{f"norm.{one}": (32,) for one in norms},
        "norm.num_batches_tracked": (),
        "head.weight": (5, 32),
        "head.bias": (5,),
    }
    assert state["levels.0.blocks.0.conv1.weight"] == (4, 4, 3, 3)
    assert state["levels.0.downsample.reduction.0.weight"] == (8, 4, 3, 3)
    block = "levels.2.blocks.0."
    assert {key[len(block) :]: shape for key, shape in state.items() if key.startswith(block)} == {
        **{f"{norm}.{part}": (16,) for norm in ("norm1", "norm2") for part in ("weight", "bias")},
        "gamma_1": (16,),
        "gamma_2": (16,),
        "mixer.A_log": (8, 4),
        "mixer.D": (8,),
        "mixer.in_proj.weight": (16, 16),
        "mixer.conv1d_x.weight": (8, 1, 3),
        "mixer.conv1d_z.weight": (8, 1, 3),
        "mixer.x_proj.weight": (9, 8),
        "mixer.dt_proj.weight": (8, 1),
        "mixer.dt_proj.bias": (8,),
        "mixer.out_proj.weight": (16, 16),
        "mlp.fc1.weight": (64, 16),
        "mlp.fc1.bias": (64,),
        "mlp.fc2.weight": (16, 64),
        "mlp.fc2.bias": (16,),
    }
    assert state["levels.2.blocks.1.mixer.qkv.weight"] == (48, 16)
    assert state["levels.2.blocks.1.mixer.proj.bias"] == (16,)
    assert "levels.3.downsample.reduction.0.weight" not in state
    without = {key for key in state if "gamma" not in key}
    assert set(small(replace(SMALL, layer_scale=False)).state_dict()) == without


def test_the_dt_bias_is_added_twice() -> None:
    """A mixer against mamba's own scan, whose delta has the bias once already."""
    torch.manual_seed(2)
    mixer = MambaVisionMixer(SMALL, 16).requires_grad_(False)
    hidden = randn(0, 3, 9, 16)
    xz = mixer.in_proj(hidden).transpose(1, 2)
    x, z = (
        F.silu(F.conv1d(half, conv.weight, padding=1, groups=8))
        for half, conv in zip(xz.chunk(2, 1), (mixer.conv1d_x, mixer.conv1d_z), strict=True)
    )
    delta, B, C = mixer.x_proj(x.transpose(1, 2)).split([1, 4, 4], -1)
    delta = F.linear(delta, mixer.dt_proj.weight, 2 * mixer.dt_proj.bias).transpose(1, 2)
    scan = mamba_selective_scan_ref()
    B, C = B.transpose(1, 2), C.transpose(1, 2)
    y = scan(x, delta, -torch.exp(mixer.A_log), B, C, mixer.D, delta_softplus=True)
    expected = mixer.out_proj(torch.cat((y, z), 1).transpose(1, 2))
    assert_close(mixer(hidden), expected, 1e-5)


def test_both_dt_biases_are_folded_into_the_linear() -> None:
    gm, _ = prepared()
    for scan in calls(gm, ops.selective_scan.default):
        assert argument(scan, "delta_bias") is None
        assert not argument(scan, "reverse")
    folded = [node for node in gm.graph.nodes if "dt_proj.folded_bias" in str(node.target)]
    original = small().levels[2].blocks[0].mixer.dt_proj.bias
    assert torch.equal(get_constant(gm, folded[0]), 2 * original)


def test_windows_do_not_see_each_other() -> None:
    """A stage's blocks on a map are its blocks on every window alone."""
    stage = small().levels[2]
    x = randn(0, 2, 16, 4, 6)
    together = stage._in_windows(x, 2)
    for i in range(0, 4, 2):
        for j in range(0, 6, 2):
            alone = stage._in_windows(x[:, :, i : i + 2, j : j + 2], 2)
            assert_close(together[:, :, i : i + 2, j : j + 2], alone, 1e-5)


def test_maps_that_are_no_multiple_of_the_window_are_padded() -> None:
    stage = small().levels[2]
    x = randn(0, 2, 16, 3, 5)
    padded = stage._in_windows(F.pad(x, (0, 1, 0, 1)), 2)
    assert_close(stage._in_windows(x, 2), padded[:, :, :3, :5], 1e-5)
    assert small()(randn(0, 2, 3, 72, 40)).shape == (2, 5)


@pytest.mark.parametrize("side", [64, 48])
def test_capture_with_a_dynamic_batch(side: int) -> None:
    """48 pixels: maps of 3x3 and 2x2 tokens, so that the first is padded."""
    x = randn(0, 2, 3, side, side)
    model = small()
    gm = capture(model, x)
    assert count(gm, ops.selective_scan.default) == 2
    prepare(gm, ouro.W4A4)
    assert_same(outputs(gm, x), outputs(model, x), 1e-5)


def test_batch_norms_are_folded_into_convolutions() -> None:
    """All but the last one, which stands behind attention."""
    x = randn(0, 2, 3, 64, 64)
    gm = capture(small(), x)
    prepare(gm, ouro.W4A4)
    before = count(gm, aten.batch_norm.default)
    assert run(gm, fold_batch_norm)
    assert (before, count(gm, aten.batch_norm.default)) == (7, 1)
    assert_same(outputs(gm, x), outputs(small(), x), 1e-5)


def test_sites() -> None:
    _, plan = prepared()
    expected = [
        f"levels.{stage}.blocks.{block}.{layer}"
        for stage in (2, 3)
        for block, layers in enumerate((MIXER, ATTENTION))
        for layer in layers
    ]
    assert [row.name for row in plan.rows if row.status == "quantized"] == expected
    scans = [row.name for row in plan.rows if row.kind == "scan"]
    assert scans == [f"levels.{stage}.blocks.0.mixer.selective_scan" for stage in (2, 3)]
    assert [r.name for r in plan.rows if r.kind == "linear" and r.status == "skipped"] == ["head"]


def test_windows_are_samples_of_a_site() -> None:
    gm, plan = prepared()
    batch = next(node for node in gm.graph.nodes if node.op == "placeholder").meta["val"].shape[0]
    for site in plan.sites:
        if site.kind == "linear":
            windows = 4 if ".2." in site.layer else 1
            value = value_of(site.source)
            assert value.shape[0] == windows * batch
            assert value.shape[1] == 4


def test_compiled_saved_and_loaded(tmp_path: Path) -> None:
    images = randn(1, 4, 3, 64, 64)
    compiled = ouro.compile(small(), images[:2], ouro.W4A4, calibration=images)
    expected, found = small()(images), compiled(images)
    assert (expected - found).norm() < 0.5 * expected.norm()
    path = tmp_path / "mambavision.pt2"
    compiled.save(path)
    assert torch.equal(ouro.load(path)(images), found)


def test_gradients_reach_every_parameter() -> None:
    torch.manual_seed(0)
    model = SMALL.build()
    assert isinstance(model.levels[2].blocks[0], HybridBlock)
    model(randn(0, 2, 3, 64, 64)).square().sum().backward()
    missing = [name for name, one in model.named_parameters() if one.grad is None]
    assert missing == []
