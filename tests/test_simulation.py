"""The simulated quantizers: bit for bit what the passes insert, gradients after METHODS P6."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

import ouro_compiler as ouro
from ouro_compiler.calibration.blocks import cut_into_blocks
from ouro_compiler.calibration.simulate import Simulation, simulated
from ouro_compiler.calibration.straight_through import OutlierQuantizer, UniformQuantizer
from ouro_compiler.compiler import TensorImages, prepare
from ouro_compiler.config import QuantConfig
from ouro_compiler.frontend.capture import capture
from ouro_compiler.frontend.checkpoint import load_model
from ouro_compiler.graph import Calibration, UniformParams, get_constant
from ouro_compiler.recipes import find_recipe
from ouro_compiler.recipes.planning import Plan
from ouro_compiler.refinement import inserted
from tests.helpers import quantizer_oracle, randn
from tests.models import images, small_vim

EXAMPLES = Path(__file__).parent.parent / "examples"


def changed(config: QuantConfig, ssm: str = "params", **activations: object) -> QuantConfig:
    spec = dataclasses.replace(config.activations, **activations)  # type: ignore[arg-type]
    return dataclasses.replace(config, activations=spec, ssm=ssm)  # type: ignore[arg-type]


def calibrated(
    model: nn.Module, x: Tensor, config: QuantConfig
) -> tuple[fx.GraphModule, Plan, Calibration]:
    gm = capture(model, x[:2])
    plan = prepare(gm, config)
    recipe = find_recipe(config.recipe)
    return gm, plan, recipe.calibrate(gm, plan, config, TensorImages(x), batch_size=8)


@pytest.mark.parametrize(
    "config",
    [
        ouro.W4A4,
        ouro.W4A8,
        changed(ouro.W4A4, outliers="static"),
        changed(ouro.W6A6, ssm="none", outliers="none"),
        changed(ouro.W4A4, inlier_scale="per_tensor", refresh_period=3),
    ],
    ids=["w4a4", "w4a8", "static", "plain", "pooled"],
)
def test_it_equals_the_inserted_graph_exactly(config: QuantConfig) -> None:
    gm, plan, found = calibrated(small_vim(), images(), config)
    x = images(8, seed=3)
    made = simulated(Simulation(gm, plan.sites, found, config))(x)
    assert torch.equal(made, inserted(gm, found, config)(x))
    assert not torch.equal(made, gm(x))


SLOW = pytest.mark.slow


@pytest.mark.parametrize("name", [pytest.param("vmamba_digits", marks=SLOW), "mambavision_digits"])
def test_it_equals_the_inserted_graph_of_other_families(name: str) -> None:
    loaded = load_model(EXAMPLES / f"{name}.safetensors")
    gm, plan, found = calibrated(loaded.module, images(4), ouro.W4A4)
    x = images(2, seed=3)
    made = simulated(Simulation(gm, plan.sites, found, ouro.W4A4))(x)
    assert torch.equal(made, inserted(gm, found, ouro.W4A4)(x))


def with_uniform_params(gm: fx.GraphModule, plan: Plan, found: Calibration) -> Calibration:
    """Hand-made tables as of a smoothing recipe: asymmetric per token, smooth on half the sites."""
    sites = {}
    for number, site in enumerate(plan.sites):
        params = found.sites[site.name]
        value = site.source.meta["val"]
        width = int(value.shape[-1])
        smooth = None
        if site.kind == "linear" and number % 2 == 0:
            smooth = (
                (0.5 + torch.rand(width, generator=torch.Generator().manual_seed(number)))
                .half()
                .float()
            )
        zero = torch.full((params.scale.numel(), 1), 7.0)
        sites[site.name] = UniformParams(
            scale=params.scale[:, None].clone(), zero_point=zero, smooth=smooth
        )
    return Calibration(sites=sites)


def test_it_equals_the_inserted_graph_of_uniform_quantizers() -> None:
    from ouro_compiler.calibration.search import quantize_weight
    from ouro_compiler.graph import QWeight

    config = changed(ouro.W4A4, ssm="none")
    gm, plan, found = calibrated(small_vim(), images(), config)
    found = with_uniform_params(gm, plan, found)
    weights = {}
    for site in plan.sites:
        weight = get_constant(gm, site.node.args[1])
        assert weight is not None
        smooth = found.sites[site.name].smooth
        codes, scale = quantize_weight(weight if smooth is None else weight * smooth, 4)
        weights[site.layer] = QWeight(codes=codes, scale=scale)
    found = dataclasses.replace(found, weights=weights)
    x = images(4, seed=3)
    simulation = Simulation(gm, plan.sites, found, config)
    assert not any(one.fixed for one in simulation.weights.values())
    assert torch.equal(simulated(simulation)(x), inserted(gm, found, config)(x))


def test_a_transformed_weight_keeps_its_codes() -> None:
    """Codes that are not the weight's rounding, as of a recipe that rotates it, are left alone."""
    config = changed(ouro.W4A4, ssm="none")
    gm, plan, found = calibrated(small_vim(), images(), config)
    before = Simulation(gm, plan.sites, found, config)
    layer = plan.sites[0].layer
    turned = dataclasses.replace(
        before.weights[layer].found(), codes=before.weights[layer].found().codes.flip(1)
    )
    found = dataclasses.replace(found, weights={layer: turned})
    simulation = Simulation(gm, plan.sites, found, config)
    assert [name for name, one in simulation.weights.items() if one.fixed] == [layer]
    x = images(4, seed=3)
    assert torch.equal(simulated(simulation)(x), inserted(gm, found, config)(x))


def test_layers_are_quantized_one_by_one() -> None:
    gm, plan, found = calibrated(small_vim(2), images(), ouro.W4A4)
    simulation = Simulation(gm, plan.sites, found, ouro.W4A4)
    x = images(4, seed=3)
    assert torch.equal(simulated(simulation, ())(x), gm(x))
    alone = dataclasses.replace(ouro.W4A4, include=("layers.1.mixer.out_proj",))
    other, other_plan, _ = calibrated(small_vim(2), images(), alone)
    assert len(other_plan.sites) == 1
    expected = inserted(other, found, alone)(x)
    assert torch.equal(simulated(simulation, ("layers.1.mixer.out_proj",))(x), expected)


# Gradients


def numeric(function: Callable[[Tensor], Tensor], at: Tensor, index: int, step: float) -> float:
    ends = []
    for sign in (1, -1):
        moved = at.clone()
        moved[index] += sign * step
        ends.append(float(function(moved)))
    return (ends[0] - ends[1]) / (2 * step)


@pytest.mark.parametrize("asymmetric", [False, True])
def test_the_scale_has_the_gradient_of_lsq(asymmetric: bool) -> None:
    """q - x / s inside, q outside, summed over what shares the scale; 0 and 1 for x."""
    x = torch.tensor([[[0.26, -0.9, 2.2], [0.11, 0.5, -3.0]]], requires_grad=True)
    scale = torch.tensor([0.2, 0.1], requires_grad=True)
    zero = torch.tensor([8.0, 5.0]) if asymmetric else None
    never = torch.full((2,), float("inf"))
    y = OutlierQuantizer.apply(x, scale, zero, never, False, (4, 8, 10, False))
    weights = torch.tensor([[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]])
    (y * weights).sum().backward()
    low, high = ([-8.0, -5.0], [7.0, 10.0]) if asymmetric else ([-7.0, -7.0], [7.0, 7.0])
    expected, inside = [0.0, 0.0], []
    for token in range(2):
        for channel in range(3):
            ratio = float(x[0, token, channel].detach() / scale[token].detach())
            code = float(np.rint(ratio))
            clipped = min(max(code, low[token]), high[token])
            inside.append(float(code == clipped))
            slope = code - ratio if code == clipped else clipped
            expected[token] += float(weights[0, token, channel]) * slope
    assert scale.grad is not None
    assert x.grad is not None
    assert torch.allclose(scale.grad, torch.tensor(expected), atol=1e-5)
    assert torch.equal(x.grad, torch.tensor(inside).view(1, 2, 3) * weights)
    assert 0 < sum(inside) < 6  # both cases were there


def test_a_clipped_value_follows_the_scale_exactly() -> None:
    """Far outside the range x-hat is the end of it: there the slope is no estimate."""
    x = torch.full((1, 4, 3), 50.0)

    def total(scale: Tensor) -> Tensor:
        return UniformQuantizer.apply(x, scale, None, 4).sum()

    scale = torch.rand(4, 1, generator=torch.Generator().manual_seed(0)) + 0.5
    learned = scale.clone().requires_grad_()
    total(learned).backward()
    assert learned.grad is not None
    for token in range(4):
        found = numeric(total, scale, token, 0.125)
        assert abs(float(learned.grad[token]) - found) < 1e-3 * abs(found)


@pytest.mark.parametrize("outlier_bits", [8, 16])
@pytest.mark.parametrize("reverse", [False, True])
def test_outliers_leave_the_scale_alone(outlier_bits: int, reverse: bool) -> None:
    x = randn(0, 2, 23, 12)
    x[:, :, 3] *= 12
    scale, threshold = torch.full((23,), 0.4), torch.full((23,), 5.0)
    static = (4, outlier_bits, 5, reverse)
    listed = quantizer_oracle(
        x.numpy(), scale.numpy(), None, threshold.numpy(), 4, outlier_bits, 5, reverse
    )
    x.requires_grad_()
    learned = scale.clone().requires_grad_()
    y = OutlierQuantizer.apply(x, learned, None, threshold, False, static)
    assert torch.equal(y, torch.from_numpy(listed.dequantized))
    mask = torch.from_numpy(listed.listed)
    assert 0.02 < mask.float().mean() < 0.5
    (y * mask).sum().backward()
    assert learned.grad is not None
    assert x.grad is not None
    assert torch.equal(learned.grad, torch.zeros(23))
    assert torch.equal(x.grad, mask.float())


# Blocks


def test_blocks_are_intervals_that_cover_the_graph() -> None:
    gm, plan, _ = calibrated(small_vim(2), images(2), ouro.W4A4)
    blocks = cut_into_blocks(gm, plan.sites)
    calls = [node for node in gm.graph.nodes if node.op == "call_function"]
    assert [node for block in blocks for node in block.calls] == calls
    assert [block.name for block in blocks] == ["", "layers.0", "layers.1", ""]
    assert [site.name for block in blocks for site in block.sites] == [s.name for s in plan.sites]
    for block in blocks[1:3]:
        assert all(layer.startswith(f"{block.name}.") for layer in block.layers)
        (output,) = block.outputs  # the residual does not depend on what is learned
        assert output.target is torch.ops.aten.linear.default


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        pytest.param(
            "vmamba_digits",
            "layers.0.blocks.0 layers.0.blocks.1 layers.1.blocks.0 layers.1.blocks.1",
            marks=SLOW,
        ),
        (
            "mambavision_digits",
            "levels.2.blocks.0 levels.2.blocks.1 levels.3.blocks.0 levels.3.blocks.1",
        ),
    ],
)
def test_blocks_of_stages(name: str, expected: str) -> None:
    loaded = load_model(EXAMPLES / f"{name}.safetensors")
    gm = capture(loaded.module, images(2))
    plan = prepare(gm, ouro.W4A4)
    names = [block.name for block in cut_into_blocks(gm, plan.sites) if block.sites]
    assert " ".join(names) == expected


class Numbered(nn.Module):
    """Blocks with numbered parts, and a table that all of them read."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Parameter(torch.randn(12))
        self.stem = nn.Linear(12, 12)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 12)) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x * self.table)
        return x


def test_numbered_parts_are_no_blocks_and_shared_tables_no_cuts() -> None:
    gm = capture(Numbered(), randn(0, 2, 7, 12))
    plan = prepare(gm, ouro.W4A4)
    blocks = cut_into_blocks(gm, plan.sites)
    assert [(block.name, len(block.sites)) for block in blocks if block.sites] == [
        ("stem", 1),
        ("blocks.0", 2),
        ("blocks.1", 2),
        ("blocks.2", 2),
    ]
