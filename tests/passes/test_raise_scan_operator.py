"""raise_scan_operator: torch's scans in several spellings, and scans that are something else."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._higher_order_ops.associative_scan import associative_scan
from torch._higher_order_ops.scan import scan

import ouro_compiler as ouro_package
from ouro_compiler.frontend.capture import capture
from ouro_compiler.frontend.standins import replaced_functions
from ouro_compiler.graph import argument
from ouro_compiler.passes import NORMALIZE
from ouro_compiler.passes.base import PassContext, PassError, run_passes
from ouro_compiler.passes.raise_scan_operator import raise_scan_operator
from tests.helpers import assert_close, randn
from tests.passes.graphs import assert_pass, calls, capture_small, count, other_batches, ouro

LENGTH, CHANNELS, STATES = 6, 5, 3
SCAN = ouro.selective_scan.default
SCAN_ON_CODES = torch.ops.ouro.selective_scan_dynamic_outlier.default


class Scanning(nn.Module):
    """Tokens (B, L, D) through a scan that `written(module, u, delta, B, C)` computes."""

    def __init__(self, written: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.written = written
        self.A = nn.Parameter(-torch.rand(CHANNELS, STATES) - 0.1)
        self.D = nn.Parameter(torch.randn(CHANNELS))
        self.bias = nn.Parameter(torch.randn(CHANNELS))
        self.project = nn.Linear(CHANNELS, CHANNELS + 2 * STATES)

    def forward(self, x: Tensor) -> Tensor:
        delta, B, C = self.project(x).split([CHANNELS, STATES, STATES], dim=-1)
        return self.written(self, x, delta, B, C)


def reference(m: Scanning, x: Tensor, *, softplus: bool, **given: Any) -> Tensor:
    """The same with this project's scan."""
    delta, B, C = m.project(x).split([CHANNELS, STATES, STATES], dim=-1)
    delta = F.softplus(delta + given.pop("bias", 0)) if softplus else delta
    u, delta, B, C = (t.transpose(1, 2) for t in (x, delta, B, C))
    return torch.ops.ouro.selective_scan(u, delta, m.A, B, C, **given).transpose(1, 2)


def zeros(u: Tensor) -> Tensor:
    return torch.zeros(u.shape[0], CHANNELS, STATES)


# --- scan


def all_in_the_step(m: Any, u: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> Tensor:
    def step(h: Tensor, now: Any) -> Any:
        u, delta, B, C = now
        decay = torch.exp(delta.unsqueeze(-1) * m.A)
        h = decay * h + (delta * u).unsqueeze(-1) * B.unsqueeze(1)
        return h, (h * C.unsqueeze(1)).sum(-1) + m.D * u

    return scan(step, zeros(u), (u, F.softplus(delta), B, C), dim=1)[1]


def softplus_in_the_step_backwards(
    m: Any, u: Tensor, delta: Tensor, B: Tensor, C: Tensor
) -> Tensor:
    def step(h: Any, now: Any) -> Any:
        u, B, C = now["u"], now["B"], now["C"]
        delta = F.softplus(now["delta"] + m.bias)
        h = torch.einsum("bd,bn,bd->bdn", delta, B, u) + h[0] * torch.exp(
            torch.einsum("bd,dn->bdn", delta, m.A)
        )
        return [h], torch.einsum("bdn,bn->bd", h, C)

    items = {"u": u, "delta": delta, "B": B, "C": C}
    return scan(step, [zeros(u)], items, dim=1, reverse=True)[1]


def products_before(m: Any, u: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Time comes first."""
    u, delta, B, C = (t.transpose(0, 1) for t in (u, delta, B, C))
    decay = torch.exp(delta.unsqueeze(-1) * m.A)
    update = delta.unsqueeze(-1) * B.unsqueeze(2) * u.unsqueeze(-1)

    def step(h: Tensor, now: Any) -> Any:
        decay, update, C = now
        h = decay * h + update
        return h, (h @ C.unsqueeze(-1)).squeeze(-1)

    _, y = scan(step, u.new_zeros(u.shape[1], CHANNELS, STATES), (decay, update, C))
    return (y.transpose(0, 1) + u.transpose(0, 1) * m.D) * F.silu(u.transpose(0, 1) - 1)


def states_come_out(m: Any, u: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> Tensor:
    update = torch.einsum("bld,bln,bld->bldn", delta, B, u)

    def step(h: Tensor, now: Any) -> Any:
        delta, update = now
        h = torch.exp(delta[..., None] * m.A) * h + update
        return h, h.clone()

    _, states = scan(step, zeros(u), (delta, update), dim=1)
    return torch.einsum("bldn,bln->bld", states, C)


# --- associative_scan


def pairs(first: Any, second: Any) -> Any:
    (a1, b1), (a2, b2) = first, second
    return a1 * a2, a2 * b1 + b2


def associative(m: Any, u: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> Tensor:
    delta = F.softplus(delta)
    decay = torch.exp(delta.unsqueeze(-1) * m.A)
    update = delta.unsqueeze(-1) * B.unsqueeze(2) * u.unsqueeze(-1)
    _, states = associative_scan(pairs, (decay, update), 1, combine_mode="generic")
    return ((states * C.unsqueeze(2)).sum(-1) + m.D * u) * F.silu(u - 1)


def associative_backwards(m: Any, u: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """States (B, D, L, N), in a mode that torch refuses on a CPU."""
    u, delta, B = u.transpose(1, 2), delta.transpose(1, 2), B.unsqueeze(1)
    decay = torch.exp(delta.unsqueeze(-1) * m.A[:, None])
    update = (delta * u).unsqueeze(-1) * B

    def together(first: Any, second: Any) -> Any:
        return {
            "b": second["b"] + first["b"] * second["a"],
            "a": second["a"] * first["a"],
        }

    items = {"b": update, "a": decay}
    states = associative_scan(together, items, 2, reverse=True, combine_mode="pointwise")["b"]
    return torch.einsum("bdln,bln->bdl", states, C).transpose(1, 2)


def associative_states_first(m: Any, u: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """States (B, L, N, D), whose channels are summed last, by matmul after a transpose."""
    decay = torch.exp(torch.einsum("bld,dn->blnd", delta, m.A))
    update = torch.einsum("bln,bld->blnd", B, delta * u)
    _, states = associative_scan(pairs, (decay, update), 1, combine_mode="generic")
    return (states.permute(0, 1, 3, 2) @ C.unsqueeze(-1)).squeeze(-1)


SPELLINGS: list[tuple[Callable[..., Tensor], dict[str, Any]]] = [
    (all_in_the_step, {"softplus": True, "D": True}),
    (softplus_in_the_step_backwards, {"softplus": True, "bias": True, "reverse": True}),
    (products_before, {"softplus": False, "D": True, "z": True}),
    (states_come_out, {"softplus": False}),
    (associative, {"softplus": True, "D": True, "z": True}),
    (associative_backwards, {"softplus": False, "reverse": True}),
    (associative_states_first, {"softplus": False}),
]


@pytest.mark.parametrize(("written", "has"), SPELLINGS)
def test_raises_scans_however_they_are_written(
    written: Callable[..., Tensor], has: dict[str, bool]
) -> None:
    module, x = Scanning(written), randn(1, 3, LENGTH, CHANNELS)
    with replaced_functions():
        gm = assert_pass(
            raise_scan_operator, module, x, before={SCAN: 0}, after={SCAN: 1}, tolerance=2e-6
        )
    assert not any(isinstance(one, torch.fx.GraphModule) for one in gm.children())
    [node] = calls(gm, SCAN)
    found = {name: argument(node, name) not in (None, False) for name in ("D", "z", "reverse")}
    assert found == {name: has.get(name, False) for name in found}
    assert argument(node, "delta_softplus") == has["softplus"]
    for batch in other_batches(x):
        z = (batch - 1).transpose(1, 2)
        given = {"D": module.D, "z": z, "bias": module.bias, "reverse": True}
        kept = {name: value for name, value in given.items() if has.get(name)}
        with torch.no_grad():
            expected = reference(module, batch, softplus=has["softplus"], **kept)
            assert_close(gm(batch), expected, 2e-6)


# --- near misses


def no_exponential(m: Any, u: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> Tensor:
    def step(h: Tensor, now: Any) -> Any:
        u, delta, B, C = now
        h = torch.sigmoid(delta.unsqueeze(-1) * m.A) * h + u.unsqueeze(-1) * B.unsqueeze(1)
        return h, (h * C.unsqueeze(1)).sum(-1)

    return scan(step, zeros(u), (u, delta, B, C), dim=1)[1]


def selective_step(m: Any) -> Callable[[Tensor, Any], Any]:
    def step(h: Tensor, now: Any) -> Any:
        u, delta, B, C = now
        h = torch.exp(delta.unsqueeze(-1) * m.A) * h + (delta * u).unsqueeze(-1) * B.unsqueeze(1)
        return h, (h * C.unsqueeze(1)).sum(-1)

    return step


def first_state_given(m: Any, u: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> Tensor:
    return scan(selective_step(m), zeros(u) + m.A, (u, delta, B, C), dim=1)[1]


def last_state_used(m: Any, u: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> Tensor:
    last, y = scan(selective_step(m), zeros(u), (u, delta, B, C), dim=1)
    return y + last.sum(-1).unsqueeze(1)


def another_delta(m: Any, u: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The update's delta is not the decay's."""

    def step(h: Tensor, now: Any) -> Any:
        u, delta, B, C = now
        h = torch.exp(delta.unsqueeze(-1) * m.A) * h + (u * u).unsqueeze(-1) * B.unsqueeze(1)
        return h, (h * C.unsqueeze(1)).sum(-1)

    return scan(step, zeros(u), (u, delta, B, C), dim=1)[1]


def carried_matrix(m: Any, u: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """A is a second state."""

    def step(carried: Any, now: Any) -> Any:
        h, A = carried
        u, delta, B, C = now
        h = torch.exp(delta.unsqueeze(-1) * A) * h + (delta * u).unsqueeze(-1) * B.unsqueeze(1)
        return (h, A * 0.9), (h * C.unsqueeze(1)).sum(-1)

    return scan(step, (zeros(u), m.A * 1), (u, delta, B, C), dim=1)[1]


def matrix_of_each_step(m: Any, u: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """A changes from step to step."""
    A = m.A.expand(LENGTH, CHANNELS, STATES) * torch.arange(1.0, LENGTH + 1)[:, None, None]

    def step(h: Tensor, now: Any) -> Any:
        u, delta, B, C, A = now
        h = torch.exp(delta.unsqueeze(-1) * A) * h + (delta * u).unsqueeze(-1) * B.unsqueeze(1)
        return h, (h * C.unsqueeze(1)).sum(-1)

    items = tuple(t.transpose(0, 1) for t in (u, delta, B, C))
    return scan(step, zeros(u), (*items, A), dim=0)[1].transpose(0, 1)


def sums(m: Any, u: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """An associative scan of another kind."""
    running = associative_scan(lambda a, b: a + b, u.unsqueeze(-1) * B.unsqueeze(2), 1)
    return (running * C.unsqueeze(2)).sum(-1)


OTHERS = [
    no_exponential,
    first_state_given,
    last_state_used,
    another_delta,
    carried_matrix,
    matrix_of_each_step,
    sums,
]


@pytest.mark.parametrize("written", OTHERS)
def test_other_scans_are_written_out_and_noted(written: Callable[..., Tensor]) -> None:
    module, x = Scanning(written), randn(1, 3, LENGTH, CHANNELS)
    with replaced_functions():
        gm = capture_small(module, x)
    batches = other_batches(x)
    with torch.no_grad():
        expected = [gm(batch) for batch in batches]
    context = PassContext()
    assert run_passes(gm, [raise_scan_operator], context)
    assert count(gm, SCAN) == 0
    assert [f"a torch scan of {LENGTH} steps was seen" in note for note in context.notes] == [True]
    with torch.no_grad():
        for batch, wanted in zip(batches, expected, strict=True):
            assert_close(gm(batch), wanted, 2e-6)
    assert not raise_scan_operator(gm, context)


def test_a_graph_without_scans_is_left_alone() -> None:
    gm = capture_small(nn.Linear(3, 3), randn(1, 2, 3))
    assert not raise_scan_operator(gm, PassContext())


# --- refused


def test_too_many_steps_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[raise_scan_operator.__module__], "MAX_STEPS", LENGTH - 1)
    gm = capture_small(Scanning(no_exponential), randn(1, 3, LENGTH, CHANNELS))
    with pytest.raises(PassError, match=f"a torch scan of {LENGTH} steps is no selective scan"):
        run_passes(gm, [raise_scan_operator], PassContext())


def test_other_operators_are_refused() -> None:
    class Conditional(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))

    gm = capture_small(Conditional(), randn(1, 2, 3))
    with pytest.raises(PassError, match="higher-order operator cond; write it with tensor"):
        run_passes(gm, [raise_scan_operator], PassContext())


# --- end to end


class Classifier(nn.Module):
    """Grey images cut into rows of pixels, two scans over them, and a head."""

    def __init__(self, written: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed = nn.Linear(28, CHANNELS)
        self.scans = nn.Sequential(Scanning(written), Scanning(written))
        self.head = nn.Linear(CHANNELS, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.scans(self.embed(images[:, 0])).relu_().mean(1))


@pytest.mark.parametrize("written", [all_in_the_step, associative, softplus_in_the_step_backwards])
def test_models_with_torch_scans_compile(written: Callable[..., Tensor]) -> None:
    images = randn(3, 8, 1, 28, 28)
    model = Classifier(written).eval()
    gm = capture(model, images[:2])
    run_passes(gm, NORMALIZE, PassContext())
    assert count(gm, SCAN) == 2
    with torch.no_grad():
        assert_close(gm(images[:3]), model(images[:3]), 1e-5)
    compiled = ouro_package.compile(model, images[:2], ouro_package.W4A4, calibration=images)
    assert count(compiled.graph_module, SCAN_ON_CODES) == 2
    assert compiled.report["notes"] == []
    kinds = [row["kind"] for row in compiled.report["layers"]["rows"]]
    assert kinds.count("scan") == 2
