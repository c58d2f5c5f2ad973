"""All normalising passes on VMamba blocks in the forms that public code uses.

Channel-last maps with linears on (B, H, W, K) and einsums, and channel-first ones with 1x1 and
grouped convolutions, come out as the same token sequences; the four directions of one scan come
out as four scans of two orders, from either end.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ouro_compiler.config import W4A4
from ouro_compiler.graph import Site, argument, value_of
from ouro_compiler.passes import NORMALIZE
from ouro_compiler.passes.base import PassContext, run_passes
from ouro_compiler.recipes.ouromamba import plan
from tests.helpers import randn
from tests.passes.graphs import assert_same, aten, calls, capture_small, count, ouro, outputs

DIM, INNER, STATES = 8, 16, 3
SIDES = (3, 4)


def _cross_scan(x: Tensor) -> Tensor:
    """(B, E, H, W) -> (B, 4, E, L), as in public code."""
    ahead = torch.stack([x.flatten(2), x.transpose(2, 3).contiguous().flatten(2)], dim=1)
    return torch.cat([ahead, torch.flip(ahead, dims=[-1])], dim=1)


def _cross_merge(y: Tensor, height: int, width: int) -> Tensor:
    """(B, 4, E, L) -> (B, E, L), as in public code."""
    batch, _, channels, length = y.shape
    y = y[:, :2] + y[:, 2:].flip(dims=[-1]).view(batch, 2, -1, length)
    columns = y[:, 1].view(batch, -1, width, height).transpose(2, 3).contiguous()
    return y[:, 0] + columns.view(batch, channels, length)


class PublicBlock(nn.Module):
    """One VMamba block with an MLP; `channel_first` chooses between the two public forms.

    cross_scan and cross_merge are one op, as where they replace public code's Triton, or written as
    in its PyTorch form.
    """

    def __init__(self, channel_first: bool, rank: int, written_out: bool) -> None:
        super().__init__()
        self.channel_first, self.rank, self.written_out = channel_first, rank, written_out
        self.norm, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.in_proj = nn.Linear(DIM, INNER, bias=False)
        self.conv2d = nn.Conv2d(INNER, INNER, 3, groups=INNER, padding=1)
        self.x_proj_weight = nn.Parameter(0.3 * torch.randn(4, rank + 2 * STATES, INNER))
        self.dt_projs_weight = nn.Parameter(0.3 * torch.randn(4, INNER, rank))
        self.dt_projs_bias = nn.Parameter(0.3 * torch.randn(4, INNER))
        self.A_logs = nn.Parameter(torch.rand(4 * INNER, STATES))
        self.Ds = nn.Parameter(torch.ones(4 * INNER))
        self.out_norm = nn.LayerNorm(INNER)
        self.out_proj = nn.Linear(INNER, DIM, bias=False)
        self.fc1, self.fc2 = nn.Linear(DIM, 2 * DIM), nn.Linear(2 * DIM, DIM)

    def _linear(self, layer: nn.Linear, x: Tensor) -> Tensor:
        if not self.channel_first:
            return layer(x)
        return F.conv2d(x, layer.weight[:, :, None, None], layer.bias)

    def _norm(self, layer: nn.LayerNorm, x: Tensor) -> Tensor:
        if not self.channel_first:
            return layer(x)
        return layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def _projections(self, xs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """delta (B, 4 E, L), B and C (B, 4, N, L) of the four orders (B, 4, E, L)."""
        batch, _, _, length = xs.shape
        parts = [self.rank, STATES, STATES]
        if not self.channel_first:
            x_dbl = torch.einsum("b k d l, k c d -> b k c l", xs, self.x_proj_weight)
            delta, B, C = x_dbl.split(parts, dim=2)
            delta = torch.einsum("b k r l, k d r -> b k d l", delta, self.dt_projs_weight)
            return delta.contiguous().view(batch, -1, length), B.contiguous(), C.contiguous()
        weight = self.x_proj_weight.view(-1, INNER, 1)
        x_dbl = F.conv1d(xs.view(batch, -1, length), weight, groups=4)
        delta, B, C = x_dbl.view(batch, 4, -1, length).split(parts, dim=2)
        flat = delta.contiguous().view(batch, -1, length)
        delta = F.conv1d(flat, self.dt_projs_weight.view(4 * INNER, -1, 1), groups=4)
        return delta, B.contiguous(), C.contiguous()

    def _scans(self, x: Tensor) -> Tensor:
        """(B, E, H, W) -> (B, E, L)."""
        batch, _, height, width = x.shape
        xs = _cross_scan(x) if self.written_out else ouro.cross_scan(x)
        delta, B, C = self._projections(xs)
        y = ouro.selective_scan(
            xs.view(batch, -1, height * width), delta, -self.A_logs.exp(), B, C, self.Ds,
            None, self.dt_projs_bias.view(-1), True,
        )  # fmt: skip
        y = y.contiguous().view(batch, 4, INNER, -1)
        merge = _cross_merge if self.written_out else ouro.cross_merge
        return merge(y, height, width)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x = images if self.channel_first else images.permute(0, 2, 3, 1)
        hidden = self._linear(self.in_proj, self._norm(self.norm, x))
        hidden = hidden if self.channel_first else hidden.permute(0, 3, 1, 2).contiguous()
        y = self._scans(F.silu(self.conv2d(hidden)))
        y = y.view(y.shape[0], INNER, *SIDES)
        y = self._norm(self.out_norm, y if self.channel_first else y.permute(0, 2, 3, 1))
        x = x + self._linear(self.out_proj, y)
        x = x + self._linear(self.fc2, F.gelu(self._linear(self.fc1, self._norm(self.norm2, x))))
        return x if self.channel_first else x.permute(0, 3, 1, 2)


@pytest.mark.parametrize("written_out", [False, True], ids=["ops", "written out"])
@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("channel_first", [False, True], ids=["channel last", "channel first"])
def test_public_blocks(channel_first: bool, rank: int, written_out: bool) -> None:
    torch.manual_seed(0)
    module = PublicBlock(channel_first, rank, written_out).requires_grad_(False)
    x = randn(0, 2, DIM, *SIDES)
    gm = capture_small(module, x)
    run_passes(gm, NORMALIZE, PassContext())
    assert_same(outputs(gm, x), outputs(module, x), 1e-5)
    for linear in calls(gm, aten.linear.default):
        batch, length, _ = value_of(linear.args[0]).shape
        assert isinstance(batch, torch.SymInt)
        assert length == SIDES[0] * SIDES[1]
    assert count(gm, aten.einsum.default, aten.conv1d.default) == 0
    assert _directions(gm) == [False, False, True, True]
    found = plan(gm, W4A4)
    assert {row.name for row in found.rows if row.status == "quantized"} == {
        "in_proj",
        *(f"{layer}_{k}" for k in range(4) for layer in ("x_proj", "dt_projs")),
        "out_proj",
        "fc1",
        "fc2",
    }
    assert [row.name for row in found.rows if row.status == "skipped"] == ["conv2d"]
    _check_sites({site.name: site for site in found.sites})
    assert run_passes(gm, NORMALIZE, PassContext()) == []


def _directions(gm: fx.GraphModule) -> list[bool]:
    """`reverse` of every scan; nothing is stacked, cut or flipped around them."""
    assert count(gm, ouro.cross_scan.default, ouro.cross_merge.default, aten.flip.default) == 0
    assert count(gm, aten.cat.default, aten.stack.default, aten.select.int) == 0
    assert count(gm, aten.slice.Tensor, aten.chunk.default) == 0
    scans = calls(gm, ouro.selective_scan.default)
    assert all(argument(scan, "delta_bias") is None for scan in scans)  # it is in dt_projs
    return [argument(scan, "reverse") for scan in scans]


def _check_sites(sites: dict[str, Site]) -> None:
    """Every direction has its own, in its own order; two directions read one tensor."""
    for k in range(4):
        assert sites[f"x_proj_{k}.input"].reverse == sites[f"dt_projs_{k}.input"].reverse == (k > 1)
    rows, columns = sites["x_proj_0.input"].source, sites["x_proj_1.input"].source
    assert rows is sites["x_proj_2.input"].source
    assert columns is sites["x_proj_3.input"].source
    assert rows is not columns
    scans = [f"selective_scan{which}" for which in ("", "_1", "_reverse", "_reverse_1")]
    operands = [sites[f"{scan}.{name}"] for scan in scans for name in ("delta", "B", "C")]
    assert len({site.source for site in operands}) == 12
    assert all(site.reverse == ("_reverse" in site.layer) for site in operands)
