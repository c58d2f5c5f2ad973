"""raise_selective_scan: loops spelled in different ways, and loops that are something else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ouro_compiler as ouro_package
from ouro_compiler.graph import argument, value_of
from ouro_compiler.passes.base import PassContext, run_passes
from ouro_compiler.passes.raise_selective_scan import raise_selective_scan
from ouro_compiler.passes.remove_noops import remove_noops
from tests.helpers import mamba_selective_scan_ref, randn
from tests.passes.graphs import assert_pass, calls, capture_small, count, ouro

LENGTH, CHANNELS, STATES = 6, 5, 3
SCAN = ouro.selective_scan.default
SCAN_ON_CODES = torch.ops.ouro.selective_scan_dynamic_outlier.default


class Scanning(nn.Module):
    """Tokens (B, L, D) through a scan that `loop(module, u, delta, B, C)` computes."""

    def __init__(self, loop: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.loop = loop
        self.A = nn.Parameter(-torch.rand(CHANNELS, STATES) - 0.1)
        self.D = nn.Parameter(torch.randn(CHANNELS))
        self.bias = nn.Parameter(torch.randn(CHANNELS))
        self.project = nn.Linear(CHANNELS, CHANNELS + 2 * STATES)

    def forward(self, x: Tensor) -> Tensor:
        delta, B, C = self.project(x).split([CHANNELS, STATES, STATES], dim=-1)
        return self.loop(self, x, delta, B, C)


def zeros(u: Tensor) -> Tensor:
    return torch.zeros(u.shape[0], CHANNELS, STATES)


def all_at_once(m: Any, u: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> Tensor:
    delta = F.softplus(delta)
    decay = torch.exp(delta.unsqueeze(-1) * m.A)
    update = delta.unsqueeze(-1) * B.unsqueeze(2) * u.unsqueeze(-1)
    h, ys = zeros(u), []
    for t in range(u.shape[1]):
        h = decay[:, t] * h + update[:, t]
        ys.append((h @ C[:, t].unsqueeze(-1)).squeeze(-1))
    return torch.stack(ys, dim=1)


def step_by_step(m: Any, u: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> Tensor:
    delta = F.softplus(delta)
    h, ys = zeros(u), []
    for t in range(u.shape[1]):
        h = (
            torch.exp(delta[:, t, :, None] * m.A) * h
            + (delta[:, t] * u[:, t])[..., None] * B[:, t, None]
        )
        ys.append((h * C[:, t].unsqueeze(1)).sum(-1) + m.D * u[:, t])
    return torch.cat([y.unsqueeze(1) for y in ys], dim=1)


def backwards(m: Any, u: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Without softplus; the last token's state is its update alone; (B, N, D) states."""
    delta = delta.abs()
    decay = torch.exp(torch.einsum("bld,dn->blnd", delta, m.A))
    update = torch.einsum("bln,bld->blnd", B, delta * u)
    ys: list[Any] = [None] * u.shape[1]
    h: Any = None
    for t in reversed(range(u.shape[1])):
        h = update[:, t] if h is None else update[:, t] + h * decay[:, t]
        ys[t] = torch.einsum("bnd,bn->bd", h, C[:, t])
    return torch.stack(ys, dim=2).transpose(1, 2)


def mambas(m: Any, u: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> Tensor:
    turned = [t.transpose(1, 2) for t in (u, delta)]
    rest = [t.transpose(1, 2) for t in (B, C)]
    scan = mamba_selective_scan_ref()
    y = scan(*turned, m.A, *rest, m.D, turned[0] + 1, m.bias, True)
    return y.transpose(1, 2)


def with_gate_and_skip_behind(m: Any, u: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> Tensor:
    return (all_at_once(m, u, delta, B, C) + u * m.D) * F.silu(u - 1)


@pytest.mark.parametrize(
    ("loop", "expected"),
    [
        (all_at_once, {"delta_softplus": True, "reverse": False, "D": False, "z": False}),
        (step_by_step, {"delta_softplus": True, "reverse": False, "D": True, "z": False}),
        (backwards, {"delta_softplus": False, "reverse": True, "D": False, "z": False}),
        (mambas, {"delta_softplus": True, "reverse": False, "D": True, "z": True}),
        (with_gate_and_skip_behind, {"delta_softplus": True, "D": True, "z": True}),
    ],
)
def test_raises_loops_however_they_are_written(
    loop: Callable[..., Tensor], expected: dict[str, bool]
) -> None:
    gm = assert_pass(
        raise_selective_scan,
        Scanning(loop),
        randn(1, 3, LENGTH, CHANNELS),
        before={SCAN: 0},
        after={SCAN: 1},
        tolerance=2e-6,
        prepare=(remove_noops,),
    )
    scan = calls(gm, SCAN)[0]
    found = {name: argument(scan, name) for name in expected}
    assert {name: value not in (None, False) for name, value in found.items()} == expected
    for name, rank in (("u", 3), ("delta", 3), ("A", 2), ("B", 3), ("C", 3)):
        assert value_of(argument(scan, name)).dim() == rank


def test_a_long_loop() -> None:
    """Some 800 nodes become a few."""
    gm = capture_small(Scanning(step_by_step), randn(1, 2, 64, CHANNELS))
    x = randn(2, 2, 64, CHANNELS)
    expected = gm(x)
    assert len(gm.graph.nodes) > 800
    assert run_passes(gm, [remove_noops, raise_selective_scan], PassContext())
    assert len(gm.graph.nodes) < 40
    torch.testing.assert_close(gm(x), expected, atol=1e-4, rtol=1e-4)


# --- near misses


def other_places(m: Any, u: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """C of the token before."""
    delta, h, ys = F.softplus(delta), zeros(u), []
    for t in range(u.shape[1]):
        h = (
            torch.exp(delta[:, t, :, None] * m.A) * h
            + (delta[:, t] * u[:, t])[..., None] * B[:, t, None]
        )
        ys.append((h * C[:, max(t - 1, 0)].unsqueeze(1)).sum(-1))
    return torch.stack(ys, dim=1)


def no_exponential(m: Any, u: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> Tensor:
    h, ys = zeros(u), []
    for t in range(u.shape[1]):
        h = torch.sigmoid(delta[:, t, :, None] * m.A) * h + u[:, t, :, None] * B[:, t, None]
        ys.append((h * C[:, t].unsqueeze(1)).sum(-1))
    return torch.stack(ys, dim=1)


def first_state_given(m: Any, u: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> Tensor:
    h, ys = zeros(u) + m.A, []
    for t in range(u.shape[1]):
        h = (
            torch.exp(delta[:, t, :, None] * m.A) * h
            + (delta[:, t] * u[:, t])[..., None] * B[:, t, None]
        )
        ys.append((h * C[:, t].unsqueeze(1)).sum(-1))
    return torch.stack(ys, dim=1)


def one_step_differs(m: Any, u: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> Tensor:
    h, ys = zeros(u), []
    for t in range(u.shape[1]):
        other = u if t != 3 else u * 2
        h = (
            torch.exp(delta[:, t, :, None] * m.A) * h
            + (delta[:, t] * other[:, t])[..., None] * B[:, t, None]
        )
        ys.append((h * C[:, t].unsqueeze(1)).sum(-1))
    return torch.stack(ys, dim=1)


def another_delta(m: Any, u: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The update's delta is not the decay's."""
    h, ys = zeros(u), []
    for t in range(u.shape[1]):
        h = (
            torch.exp(delta[:, t, :, None] * m.A) * h
            + (u[:, t] * u[:, t])[..., None] * B[:, t, None]
        )
        ys.append((h * C[:, t].unsqueeze(1)).sum(-1))
    return torch.stack(ys, dim=1)


@pytest.mark.parametrize(
    "loop", [other_places, no_exponential, first_state_given, one_step_differs, another_delta]
)
def test_other_loops_stay_and_are_noted(loop: Callable[..., Tensor]) -> None:
    gm = capture_small(Scanning(loop), randn(1, 2, LENGTH, CHANNELS))
    context = PassContext()
    run_passes(gm, [remove_noops], context)
    before = [node.format_node() for node in gm.graph.nodes]
    assert not raise_selective_scan(gm, context)
    assert [node.format_node() for node in gm.graph.nodes] == before
    assert len(context.notes) == 1
    assert f"a loop of {LENGTH} steps was seen" in context.notes[0]


@pytest.mark.parametrize(
    "forward",
    [
        lambda x: torch.stack([x[:, t] * 2 for t in range(LENGTH)], dim=1),
        lambda x: torch.stack(list(x.unbind(1)), dim=1),
        lambda x: torch.cat([x[:, t].unsqueeze(1) + x[:, 0].unsqueeze(1) for t in range(4)], 1),
    ],
)
def test_stacks_that_are_no_loop_are_not_noted(forward: Callable[[Tensor], Tensor]) -> None:
    class Stacking(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return forward(x)

    gm = capture_small(Stacking(), randn(1, 2, LENGTH, CHANNELS))
    context = PassContext()
    assert not raise_selective_scan(gm, context)
    assert context.notes == []


# --- end to end


class Classifier(nn.Module):
    """Grey images cut into rows of pixels, a scan over them, and a head."""

    def __init__(self, loop: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed = nn.Linear(28, CHANNELS)
        self.scan = Scanning(loop)
        self.head = nn.Linear(CHANNELS, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.scan(self.embed(images[:, 0])).mean(1))


def test_a_model_with_its_own_loop_compiles() -> None:
    images = randn(3, 8, 1, 28, 28)
    compiled = ouro_package.compile(Classifier(step_by_step).eval(), images[:2], calibration=images)
    rows = {row["kind"]: row["status"] for row in compiled.report["layers"]["rows"]}
    assert rows == {"linear": "skipped", "scan": "simulated"} | {"linear": rows["linear"]}
    assert count(compiled.graph_module, SCAN_ON_CODES) == 1
    assert compiled.report["notes"] == []
    noted = ouro_package.compile(Classifier(no_exponential).eval(), images[:2], calibration=images)
    assert "a loop of 28 steps was seen" in noted.report["notes"][0]
