"""Captured and prepared graphs of our families equal the modules, whatever their shapes.

Random small architectures; the batch that is run is not the example's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from torch import nn

import ouro_compiler as ouro_package
from ouro_compiler.compiler import prepare
from ouro_compiler.frontend.capture import batch_dimension_is_dynamic, capture
from ouro_compiler.models.mambavision import MambaVisionConfig
from ouro_compiler.models.vim import VimConfig
from ouro_compiler.models.vit import ViTConfig
from ouro_compiler.models.vmamba import VMambaConfig
from tests.helpers import REPEATABLE, assert_close, randn
from tests.passes.graphs import count, ouro
from tests.public_code import randomise

# Some seconds each for a family: an export takes about one. Nothing is shrunk, which takes minutes.
FEW = settings(REPEATABLE, max_examples=2, phases=[Phase.explicit, Phase.generate])
MORE = settings(FEW, max_examples=5)
TOLERANCE = 1e-5  # of the largest output
small = st.integers(1, 2)


@dataclass(frozen=True)
class Case:
    """An architecture and what a test needs to know of it."""

    config: Any
    scans: int


@st.composite
def vims(draw: st.DrawFn) -> Case:
    patch = draw(st.integers(1, 4))
    stride = draw(st.integers(1, patch))
    config = VimConfig(
        img_size=patch + stride * draw(st.integers(0, 3)) + draw(st.integers(0, stride - 1)),
        patch_size=patch,
        stride=stride,
        in_chans=draw(st.integers(1, 3)),
        embed_dim=draw(st.integers(1, 20)),
        depth=draw(small),
        d_state=draw(st.integers(1, 9)),
        d_conv=draw(st.integers(1, 4)),
        expand=draw(st.integers(1, 3)),
        dt_rank=draw(st.none() | st.integers(1, 5)),
        num_classes=draw(st.integers(1, 5)),
        norm=draw(st.sampled_from(["rms", "layer"])),
        cls_position=draw(st.sampled_from(["middle", "head", "none"])),
        final_pool=draw(st.sampled_from(["cls", "mean"])),
        if_divide_out=draw(st.booleans()),
    )
    return Case(config, 2 * config.depth)


@st.composite
def vmambas(draw: st.DrawFn) -> Case:
    """d_conv is odd, as in all public models."""
    depths = draw(st.sampled_from([(1,), (2,), (1, 1)]))
    config = VMambaConfig(
        img_size=draw(st.integers(8, 21)),
        in_chans=draw(st.integers(1, 3)),
        embed_dim=draw(st.sampled_from([2, 6, 8, 18])),
        depths=depths,
        d_state=draw(st.integers(1, 4)),
        d_conv=draw(st.sampled_from([1, 3, 5])),
        ssm_ratio=draw(st.sampled_from([1.0, 1.5, 2.0])),
        conv_bias=draw(st.booleans()),
        gate=draw(st.booleans()),
        mlp_ratio=draw(st.sampled_from([0.0, 1.5, 4.0])),
        patch_embed=draw(st.sampled_from(["v1", "v2"])),
        downsample=draw(st.sampled_from(["v1", "v2", "v3"])),
        num_classes=draw(st.integers(1, 5)),
    )
    return Case(config, 4 * sum(depths))


@st.composite
def mambavisions(draw: st.DrawFn) -> Case:
    """Two hybrid stages after two of convolutions; windows that need not divide the map."""
    heads = tuple(draw(st.sampled_from([1, 2])) for _ in range(4))
    config = MambaVisionConfig(
        img_size=draw(st.integers(17, 70)),
        in_chans=draw(st.integers(1, 3)),
        stem_dim=draw(st.integers(1, 5)),
        embed_dim=draw(st.sampled_from([2, 4, 6])),
        depths=(1, 1, draw(small), 1),
        heads=heads,  # type: ignore[arg-type]
        windows=(1, 1, draw(st.integers(1, 4)), draw(st.integers(1, 3))),
        d_state=draw(st.integers(1, 5)),
        d_conv=draw(st.integers(1, 4)),
        mlp_ratio=draw(st.sampled_from([1.0, 2.5])),
        layer_scale=draw(st.booleans()),
        num_classes=draw(st.integers(1, 5)),
    )
    return Case(config, config.attention_starts(2) + config.attention_starts(3))


@st.composite
def vits(draw: st.DrawFn) -> Case:
    patch, heads = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    config = ViTConfig(
        img_size=patch * draw(st.integers(1, 4)),
        patch_size=patch,
        in_chans=draw(st.integers(1, 3)),
        embed_dim=heads * draw(st.integers(1, 6)),
        depth=draw(small),
        heads=heads,
        mlp_ratio=draw(st.sampled_from([1.0, 2.5])),
        num_classes=draw(st.integers(1, 5)),
    )
    return Case(config, 0)


# Its map is padded to windows behind a reduction, in a layout of memory that the passes change.
PADDED = MambaVisionConfig(
    img_size=17, in_chans=2, stem_dim=2, embed_dim=2, depths=(1, 1, 2, 1), heads=(2, 2, 1, 2),
    windows=(1, 1, 3, 2), d_state=5, d_conv=2, mlp_ratio=1.0, num_classes=4,
)  # fmt: skip


def check(case: Case, sizes: list[int], seed: int) -> None:
    """sizes: the example's batch, and the one that is run."""
    torch.manual_seed(seed)
    config = case.config
    model: nn.Module = config.build().eval().requires_grad_(False)
    randomise(model)
    shape = (config.in_chans, config.img_size, config.img_size)
    images = randn(seed + 1, sizes[1], *shape)
    gm = capture(model, randn(seed, sizes[0], *shape))
    assert batch_dimension_is_dynamic(gm)
    with torch.no_grad():
        expected = model(images)
        assert_close(gm(images), expected, TOLERANCE)
        assert count(gm, ouro.selective_scan.default) == case.scans
        prepare(gm, ouro_package.W4A4)
        assert_close(gm(images), expected, TOLERANCE)
        assert_close(gm(images[:1]), model(images[:1]), TOLERANCE)
    assert count(gm, ouro.selective_scan.default) == case.scans


batches = st.permutations([1, 2, 3, 4])
seeds = st.integers(0, 99)


@MORE
@given(vims(), batches, seeds)
def test_vim(case: Case, sizes: list[int], seed: int) -> None:
    check(case, sizes, seed)


@settings(FEW, max_examples=3)
@given(vmambas(), batches, seeds)
def test_vmamba(case: Case, sizes: list[int], seed: int) -> None:
    check(case, sizes, seed)


@FEW
@example(Case(PADDED, scans=2), [1, 3], 7)
@given(mambavisions(), batches, seeds)
def test_mambavision(case: Case, sizes: list[int], seed: int) -> None:
    check(case, sizes, seed)


@MORE
@given(vits(), batches, seeds)
def test_vit(case: Case, sizes: list[int], seed: int) -> None:
    check(case, sizes, seed)
