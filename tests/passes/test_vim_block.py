"""All normalising passes on a Vim block: six linears, two convs, two scans, and little else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ouro_compiler.graph import argument, is_op, value_of
from ouro_compiler.models.vim import vim_micro
from ouro_compiler.passes.base import Pass, PassContext, run_passes
from ouro_compiler.passes.fold_constants import fold_constants
from ouro_compiler.passes.fold_delta_bias import fold_delta_bias
from ouro_compiler.passes.fuse_direction_flips import fuse_direction_flips
from ouro_compiler.passes.normalize_linear import normalize_linear
from ouro_compiler.passes.raise_causal_conv1d import raise_causal_conv1d
from ouro_compiler.passes.raise_norm import raise_norm
from ouro_compiler.passes.remove_noops import remove_noops
from tests.helpers import randn
from tests.passes.graphs import (
    assert_same,
    aten,
    calls,
    capture_small,
    count,
    ouro,
    outputs,
    run,
)

NORMALIZE: tuple[Pass, ...] = (
    remove_noops,
    normalize_linear,
    fold_constants,
    fold_delta_bias,
    raise_causal_conv1d,
    raise_norm,
    fuse_direction_flips,
)
LINEAR = aten.linear.default
CONV = ouro.causal_conv1d.default
SCAN = ouro.selective_scan.default
EMBED, INNER, STATES, RANK, TOKENS = 8, 16, 4, 2, 9


class Direction(nn.Module):
    """What one direction of a mixer owns."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1d = nn.Conv1d(INNER, INNER, 4, groups=INNER, padding=3)
        self.x_proj = nn.Linear(INNER, RANK + 2 * STATES, bias=False)
        self.dt_proj = nn.Linear(RANK, INNER)
        self.A_log = nn.Parameter(torch.rand(INNER, STATES))
        self.D = nn.Parameter(torch.ones(INNER))

    def forward(self, xz: Tensor, parts: str) -> Tensor:
        """(B, 2 E, L) -> (B, E, L); `parts` says how x_proj's output is taken apart."""
        length = xz.shape[-1]
        x, z = xz.chunk(2, dim=1)
        x = F.silu(self.conv1d(x)[..., :length])
        tokens = x.permute(0, 2, 1).reshape(-1, INNER)
        x_dbl = F.linear(tokens, self.x_proj.weight)
        if parts == "split":
            dt, B, C = torch.split(x_dbl, [RANK, STATES, STATES], dim=-1)
        else:
            dt, B, C = x_dbl[:, :RANK], x_dbl[:, RANK : RANK + STATES], x_dbl[:, -STATES:]
        dt = (self.dt_proj.weight @ dt.t()).reshape(INNER, -1, length).permute(1, 0, 2)
        B = B.reshape(-1, length, STATES).permute(0, 2, 1)
        C = C.reshape(-1, length, STATES).permute(0, 2, 1)
        if parts == "slices":
            B, C = B.unsqueeze(1), C.unsqueeze(1)
        A = -torch.exp(self.A_log.float())
        return ouro.selective_scan(
            x,
            dt,
            A,
            B.contiguous(),
            C.contiguous(),
            self.D.float(),
            z,
            self.dt_proj.bias.float(),
            True,
        )


class PublicBlock(nn.Module):
    """A residual block in the forms that public Vim code uses."""

    def __init__(self, parts: str) -> None:
        super().__init__()
        self.parts = parts
        self.norm = nn.LayerNorm(EMBED)
        self.in_proj = nn.Linear(EMBED, 2 * INNER, bias=False)
        self.ahead, self.back = Direction(), Direction()
        self.out_proj = nn.Linear(INNER, EMBED, bias=False)
        self.drop_path = nn.Dropout(0.1)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        residual = hidden + self.drop_path(hidden * 0.5)
        x = self.norm(residual.to(dtype=self.norm.weight.dtype))
        batch, length, channels = x.shape
        flat = x.permute(2, 0, 1).reshape(channels, batch * length)
        xz = (self.in_proj.weight @ flat).reshape(-1, batch, length).permute(1, 0, 2)
        y = self.ahead(xz, self.parts) + self.back(xz.flip([-1]), self.parts).flip([-1])
        return self.out_proj(y.permute(0, 2, 1) / 2), residual


def _of_all_parameters(node: Any) -> bool:
    inputs = node.all_input_nodes
    return bool(inputs) and all(one.op == "get_attr" for one in inputs)


def assert_normalised(gm: fx.GraphModule, blocks: int, others: int = 0) -> None:
    """What a stack of blocks holds after the normalising passes; `others` counts linears."""
    linears = calls(gm, LINEAR)
    on_tokens = [linear for linear in linears if value_of(linear.args[0]).dim() == 3]
    assert len(on_tokens) == 6 * blocks
    assert len(linears) == 6 * blocks + others
    for linear in on_tokens:
        batch, length, _ = value_of(linear.args[0]).shape
        assert isinstance(batch, torch.SymInt)
        assert isinstance(length, int)
    for linear in linears:
        assert linear.args[1].op == "get_attr"
    for target in (CONV, SCAN):
        found = calls(gm, target)
        assert len(found) == 2 * blocks
        assert [argument(op, "reverse") for op in found] == [False, True] * blocks
    assert all(argument(op, "silu") for op in calls(gm, CONV))
    assert all(argument(op, "delta_bias") is None for op in calls(gm, SCAN))
    for target in (aten.flip.default, aten.dropout.default, aten.matmul.default, aten.view.default):
        assert count(gm, target) == 0
    assert count(gm, aten.conv1d.default, aten.layer_norm.default, aten.to.dtype) == 0
    assert not [node for node in gm.graph.nodes if _is_call(node) and _of_all_parameters(node)]


def _is_call(node: fx.Node) -> bool:
    return node.op == "call_function"


def test_our_vim() -> None:
    torch.manual_seed(0)
    module = vim_micro(depth=2)
    x = randn(0, 2, 1, 28, 28)
    gm = capture_small(module, x)
    run(gm, *NORMALIZE)
    assert_normalised(gm, blocks=2, others=1)
    assert_same(outputs(gm, x), outputs(module, x), 1e-5)
    assert run_passes(gm, NORMALIZE, PassContext()) == []


@pytest.mark.parametrize("parts", ["split", "slices"])
def test_a_block_as_public_code_writes_it(parts: str) -> None:
    torch.manual_seed(0)
    module = PublicBlock(parts)
    x = randn(0, 2, TOKENS, EMBED)
    gm = capture_small(module, x)
    assert count(gm, LINEAR) == 3
    assert set(run_passes(gm, NORMALIZE, PassContext())) == {one.__name__ for one in NORMALIZE}
    assert_normalised(gm, blocks=1)
    assert count(gm, ouro.add_norm.default) == 1
    assert count(gm, aten.contiguous.default) == 0
    reshapes = calls(gm, aten.reshape.default)
    assert len(reshapes) == (4 if parts == "slices" else 0)  # B and C of one group
    assert all(is_op(node.args[0], aten.permute.default) for node in reshapes)
    names = {str(linear.args[1].target) for linear in calls(gm, LINEAR)}
    assert {"in_proj.weight", "ahead.x_proj.weight", "back.dt_proj.weight"} <= names
    assert_same(outputs(gm, x), outputs(module, x), 1e-5)
    assert run_passes(gm, NORMALIZE, PassContext()) == []


@pytest.mark.parametrize("first", [fold_constants, normalize_linear], ids=lambda one: one.__name__)
def test_folding_may_come_first(first: Pass) -> None:
    """Rules read parameters through views, so the order of these two is a choice."""
    module = PublicBlock("split")
    x = randn(0, 2, TOKENS, EMBED)
    gm = capture_small(module, x)
    run(gm, remove_noops, first, *NORMALIZE[1:])
    assert_normalised(gm, blocks=1)


class TwoBlocks(nn.Module):
    """The stream runs on beside the hidden state."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(PublicBlock("split") for _ in range(2))
        self.norm_f = nn.RMSNorm(EMBED)
        self.head = nn.Linear(EMBED, 3)

    def forward(self, hidden: Tensor) -> Tensor:
        for block in self.blocks:
            mixed, residual = block(hidden)
            hidden = mixed + residual
        return self.head(self.norm_f(hidden)[:, TOKENS // 2])


def test_a_stack_ends_in_a_fused_norm_and_a_head() -> None:
    torch.manual_seed(0)
    module = TwoBlocks()
    x = randn(0, 2, TOKENS, EMBED)
    gm = capture_small(module, x)
    run(gm, *NORMALIZE)
    assert_normalised(gm, blocks=2, others=1)
    norms = calls(gm, ouro.add_norm.default)
    assert [norm.args[5] for norm in norms] == [False, False, True]
    assert all(norm.args[1] is not None for norm in norms)
    assert_same(outputs(gm, x), outputs(module, x), 1e-5)
