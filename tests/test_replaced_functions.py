"""Functions of public code, replaced while a model is captured."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ouro_compiler as ouro
from ouro_compiler.errors import ModelError, UsageError
from ouro_compiler.frontend.capture import capture
from ouro_compiler.frontend.standins import layouts, replaced_functions
from ouro_compiler.frontend.standins.scans import mixer
from tests.helpers import MAMBA_MISSING, assert_close, mamba_selective_scan_ref, randn
from tests.isolated import run_isolated
from tests.test_standins import SCAN, count, scan_operands


@pytest.fixture
def module(request: pytest.FixtureRequest) -> Iterator[types.ModuleType]:
    """An empty public module, gone after the test."""
    made = types.ModuleType("public_code")
    made.__spec__ = importlib.machinery.ModuleSpec("public_code", None)
    sys.modules["public_code"] = made
    yield made
    del sys.modules["public_code"]


def define(module: types.ModuleType, source: str) -> None:
    """Run source code as that module's own."""
    exec(compile(source, module.__name__, "exec"), vars(module))


# --- functions replaced while a model is captured

SCANS = """
from torch import Tensor
def selective_scan_fn(u, delta, A, B, C, D=None, delta_bias=None, delta_softplus=True, oflex=True,
                      backend=None):
    raise AssertionError("the original ran")
def selective_scan_easy(us, dts, As, Bs, Cs, Ds, delta_bias=None, delta_softplus=False,
                        return_last_state=False, chunksize=64):
    raise AssertionError("the original ran")
def window_reverse(windows, window_size, H, W):
    return "Swin's"
def cross_merge_fn(y):
    return "of another kind"
alias = selective_scan_easy
"""


def test_functions_are_recognised_by_name_and_parameters(module: types.ModuleType) -> None:
    define(module, SCANS)
    originals = dict(vars(module))
    u, delta, A, B, C, D, bias = scan_operands()
    expected = mamba_selective_scan_ref()(u, delta, A, B, C, D, None, bias, True)
    with replaced_functions() as names:
        assert "public_code.selective_scan_fn" in names
        assert "public_code.selective_scan_easy" in names
        by_position = module.selective_scan_fn(
            u.half(), delta, A, B, C, D, bias, True, True, "core"
        )
        assert by_position.dtype == torch.float32
        assert_close(module.selective_scan_fn(u, delta, A, B, C, D, bias), expected, 1e-5)
        easy = module.alias(u, delta, A, B, C, D, bias, True, chunksize=16)
        assert_close(easy, expected, 1e-5)
        with pytest.raises(UsageError, match="return_last_state is not supported"):
            module.alias(u, delta, A, B, C, D, return_last_state=True)
        assert module.window_reverse(u, 2, 4, 4) == "Swin's"
        assert module.cross_merge_fn(u) == "of another kind"
        assert torch.is_tensor(ouro_scan(u, delta, A, B, C))
    assert dict(vars(module)) == originals


def ouro_scan(*args: Tensor) -> Tensor:
    """This project's reference of the same name keeps its own signature."""
    from ouro_compiler.ops.selective_scan import selective_scan_ref

    return selective_scan_ref(*args, reverse=True)


def test_functions_are_restored_after_an_error(module: types.ModuleType) -> None:
    define(module, SCANS)
    original = module.selective_scan_fn

    def fail() -> None:
        with replaced_functions():
            assert module.selective_scan_fn is not original
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert module.selective_scan_fn is original


LOOP = """
import torch
def selective_scan_ref(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False,
                       return_last_state=False):
    h, ys = u.new_zeros(u.shape[0], *A.shape), []
    for t in range(u.shape[2]):
        step = delta[:, :, t, None]
        h = torch.exp(step * A) * h + step * B[:, None, :, t] * u[:, :, t, None]
        ys.append((h * C[:, None, :, t]).sum(-1))
    return torch.stack(ys, -1)
class Model(torch.nn.Module):
    def __init__(self, last=False):
        super().__init__()
        self.A, self.last = torch.nn.Parameter(-torch.rand(4, 2)), last
        self.scan = selective_scan_ref
    def forward(self, x):
        y = self.scan(x, x.exp(), self.A, x[:, :2], x[:, 2:])
        return y + selective_scan_ref(x, x, self.A, x[:, :2], x[:, 2:], return_last_state=self.last)
"""


def test_a_loop_becomes_one_scan(module: types.ModuleType) -> None:
    """Called through the module's name, and through the model's own attribute."""
    define(module, LOOP)
    model, x = module.Model(), 0.1 * randn(0, 3, 4, 6)
    scan = model.scan
    gm = capture(model, x[:1])
    assert count(gm, SCAN) == 2
    assert model.scan is scan
    assert_close(gm(x), model(x).detach(), 1e-5)


def test_a_capture_names_what_it_refuses(module: types.ModuleType) -> None:
    define(module, LOOP)
    with pytest.raises(ModelError, match="return_last_state is not supported"):
        capture(module.Model(last=True), randn(0, 3, 4, 6))


class Direct(nn.Module):
    """A scan by its autograd.Function, around which there is no function to replace."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function
        self.A = nn.Parameter(-randn(1, 4, 2).exp())

    def forward(self, x: Tensor) -> Tensor:
        operands = (x, x.exp(), self.A, x[:, :2], x[:, 2:])
        return self.function.apply(*operands, None, x, None, True)


def _called_directly() -> dict[str, Any]:
    ouro.install_standins()
    interface = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
    model, x = Direct(interface.SelectiveScanFn), 0.1 * randn(0, 3, 4, 6)
    gm = capture(model, x[:1])
    operands = (x, x.exp(), model.A, x[:, :2], x[:, 2:])
    expected = interface.selective_scan_ref(*operands, None, x, None, True)
    return {"scans": count(gm, SCAN), "difference": float((gm(x) - expected).abs().max())}


def test_an_extension_called_directly_is_one_scan_too() -> None:
    if importlib.util.find_spec("mamba_ssm") is None:
        pytest.fail(MAMBA_MISSING, pytrace=False)
    found = run_isolated(_called_directly)
    assert found["scans"] == 1
    assert found["difference"] <= 1e-5


def test_mixers_with_one_and_two_directions() -> None:
    dim, states, rank = 6, 3, 2
    xz, A, A_b = randn(0, 2, 2 * dim, 5), -randn(1, dim, states).exp(), -randn(2, dim, states).exp()
    conv, conv_bias = randn(3, dim, 1, 4), randn(4, dim)
    x_proj, dt_proj = randn(5, rank + 2 * states, dim), randn(6, dim, rank)
    out_proj, D, bias = randn(7, 4, dim), randn(8, dim), randn(9, dim)
    x, z = xz.chunk(2, dim=1)
    x = F.silu(F.conv1d(F.pad(x, (3, 0)), conv, conv_bias, groups=dim))
    parts = torch.einsum("bdl,kd->bkl", x, x_proj).split([rank, states, states], dim=1)
    delta = torch.einsum("brl,dr->bdl", parts[0], dt_proj)
    reference = mamba_selective_scan_ref()
    ahead = reference(x, delta, A, parts[1], parts[2], D, z, bias, True)
    operands = [one.flip(-1) for one in (x, delta, parts[1], parts[2], z)]
    back = reference(*operands[:2], A_b, *operands[2:4], D, operands[4], bias, True).flip(-1)
    given = {"D": D, "delta_bias": bias}
    inner = (xz, conv, conv_bias, x_proj, dt_proj, A)
    assert_close(mixer(*inner, **given), ahead, 1e-5)
    both = mixer(*inner, out_proj_weight=out_proj, A_b=A_b, **given)
    assert_close(both, torch.einsum("bdl,od->blo", ahead + back, out_proj), 1e-5)


# --- layouts


def _orders(height: int, width: int, scans: int) -> list[list[int]]:
    """Pixel numbers in the order of each direction."""
    rows = list(range(height * width))
    columns = [y * width + x for x in range(width) for y in range(height)]
    second = columns if scans == 0 else rows
    if scans == 1:
        return [rows] * 4
    return [rows, second, rows[::-1], second[::-1]]


@pytest.mark.parametrize("scans", [0, 1, 2])
@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize("first", [True, False], ids=["channels first", "channels last"])
def test_cross_scan_and_merge(scans: int, one_by_one: bool, first: bool) -> None:
    batch, channels, height, width = 2, 3, 2, 5
    orders = _orders(height, width, scans)
    planes = randn(0, batch, 4, channels, height, width)
    if not one_by_one:
        planes = planes[:, :1].expand_as(planes)
    flat = planes.flatten(3)
    expected = torch.stack([flat[:, k][..., order] for k, order in enumerate(orders)], 1)
    x = planes if one_by_one else planes[:, 0]
    if not first:
        x = x.movedim((-2, -1), (1, 2))
    y = layouts.cross_scan(x, first, first, one_by_one, scans)
    assert torch.equal(y, expected if first else expected.permute(0, 3, 1, 2))
    back = torch.zeros_like(flat)
    for k, order in enumerate(orders):
        back[:, k][..., order] = expected[:, k]
    back = back if one_by_one else back.sum(1)
    sequences = expected.unflatten(3, (height, width))
    sequences = sequences if first else sequences.permute(0, 3, 4, 1, 2)
    merged = layouts.cross_merge(sequences, first, first, one_by_one, scans)
    assert_close(merged if first else merged.movedim(1, -1), back, 1e-6)


def test_an_unknown_scan_order_is_refused() -> None:
    with pytest.raises(UsageError, match="scans=3 is not supported"):
        layouts.cross_scan(randn(0, 1, 2, 3, 3), scans=3)


def test_windows_are_joined() -> None:
    x = randn(0, 2, 3, 4, 6)
    windows = x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 4, 5, 1).reshape(12, 4, 3)
    assert torch.equal(layouts.join_windows(windows, 2, 4, 6), x)


# --- writing in place


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first(x), inplace=True)
        filled = torch.empty_like(y)
        filled[:, 0] = y[:, 1]
        filled[:, 1:] = 2 * y[:, 1:]
        return F.silu(self.second(filled), inplace=True)


def test_nothing_is_written_in_place_after_a_capture() -> None:
    model, x = InPlace(), randn(0, 3, 5, 4)
    gm = capture(model, x[:1])
    targets = [node.target for node in gm.graph.nodes if node.op == "call_function"]
    assert not any(getattr(t, "_schema", None) and t._schema.is_mutable for t in targets)
    assert targets.count(torch.ops.aten.linear.default) == 2
    assert_close(gm(x), model(x).detach(), 1e-6)
