"""Stand-ins: modules for missing extensions, functions replaced while a model is captured."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ouro_compiler as ouro
from ouro_compiler.errors import ModelError, UsageError
from ouro_compiler.frontend.capture import capture
from ouro_compiler.frontend.standins import layouts, replaced_functions
from ouro_compiler.frontend.standins.norms import RMSNorm, layer_norm_fn, rms_norm_fn
from ouro_compiler.frontend.standins.scans import mixer
from tests.helpers import MAMBA_MISSING, assert_close, mamba_selective_scan_ref, randn
from tests.isolated import run_isolated

SCAN = torch.ops.ouro.selective_scan.default
CONV = torch.ops.ouro.causal_conv1d.default


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


def count(gm: torch.fx.GraphModule, *targets: Any) -> int:
    return sum(node.target in targets for node in gm.graph.nodes)


def scan_operands(seed: int = 0) -> tuple[Tensor, ...]:
    """u, delta, A, B, C, D, delta_bias of (2, 6, 5) with 3 states."""
    u, delta = randn(seed, 2, 6, 5), randn(seed + 1, 2, 6, 5)
    A = -randn(seed + 2, 6, 3).exp()
    B, C = randn(seed + 3, 2, 3, 5), randn(seed + 4, 2, 3, 5)
    return u, delta, A, B, C, randn(seed + 5, 6), randn(seed + 6, 6)


# --- modules that are missing


def _installed() -> dict[str, Any]:
    before = importlib.util.find_spec("selective_scan_cuda")
    stood_in = ouro.install_standins()
    again = ouro.install_standins()
    finders = [type(one).__name__ for one in sys.meta_path]
    causal_conv1d = importlib.import_module("causal_conv1d")
    functions = importlib.import_module("causal_conv1d.cpp_functions")
    x, weight = randn(0, 2, 3, 7), randn(1, 3, 4)
    expected = F.silu(F.conv1d(F.pad(x, (3, 0)), weight[:, None], groups=3))
    y = causal_conv1d.causal_conv1d_fn(x, weight, activation="silu")
    z = functions.causal_conv1d_fwd_function(x, weight, None, None, None, None, True)
    assert_close(y, expected, 1e-6)
    assert torch.equal(y, z)
    u, delta, A, B, C, D, bias = scan_operands()
    flex = importlib.import_module("selective_scan_cuda_oflex")
    out, _ = flex.fwd(u.half(), delta.half(), A, B, C, D, bias, True, 1, True)
    core = importlib.import_module("selective_scan_cuda_core")
    half, _ = core.fwd(u.half(), delta.half(), A, B, C, D, bias, True, 1)
    unknown = importlib.util.find_spec("causal_conv1d.something_else")
    return {
        "missing before": before is None,
        "stood in for": stood_in,
        "same again": again == stood_in,
        "finders": finders.count("StandInFinder"),
        "dtypes": [str(out.dtype), str(half.dtype)],
        "unknown submodule": unknown is None,
    }


def test_missing_extensions_are_stood_in_for() -> None:
    found = run_isolated(_installed)
    assert found["missing before"]
    assert "selective_scan_cuda" in found["stood in for"]
    assert "causal_conv1d" in found["stood in for"]
    assert found["same again"]
    assert found["finders"] == 1
    assert found["dtypes"] == ["torch.float32", "torch.float16"]
    assert found["unknown submodule"]


def _beside_real_ones() -> dict[str, Any]:
    real = types.ModuleType("selective_scan_cuda")
    real.__spec__ = importlib.machinery.ModuleSpec("selective_scan_cuda", None)
    sys.modules["selective_scan_cuda"] = real
    package = types.ModuleType("causal_conv1d")
    package.__spec__ = importlib.machinery.ModuleSpec("causal_conv1d", None, is_package=True)
    package.__path__ = []
    sys.modules["causal_conv1d"] = package
    stood_in = ouro.install_standins()
    same = importlib.import_module("selective_scan_cuda") is real
    submodule = importlib.util.find_spec("causal_conv1d.cpp_functions")
    return {"stood in for": stood_in, "same": same, "nothing added": submodule is None}


def test_real_extensions_are_left_alone() -> None:
    found = run_isolated(_beside_real_ones)
    assert found["same"]
    assert found["nothing added"]
    assert "selective_scan_cuda" not in found["stood in for"]
    assert "causal_conv1d" not in found["stood in for"]
    assert "selective_scan_cuda_oflex" in found["stood in for"]


# --- mamba_ssm, unmodified


class Classifier(nn.Module):
    """Patches, one residual Mamba, a head."""

    def __init__(self, mixer: nn.Module, dim: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, dim, 8, 8)
        self.norm = nn.LayerNorm(dim)
        self.mixer = mixer
        self.head = nn.Linear(dim, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.embed(x).flatten(2).transpose(1, 2)
        hidden = hidden + self.mixer(self.norm(hidden))
        return self.head(hidden.mean(1))


def _mamba_classifier(**options: Any) -> Classifier:
    torch.manual_seed(0)
    mamba = importlib.import_module("mamba_ssm").Mamba
    return Classifier(mamba(32, d_state=8, **options), 32).eval()


def _mamba() -> dict[str, Any]:
    ouro.install_standins()
    images = randn(0, 6, 3, 32, 32)
    found: dict[str, Any] = {}
    simple = importlib.import_module("mamba_ssm.modules.mamba_simple")
    interface = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
    for form in ("fast", "slow", "without causal_conv1d"):
        model = _mamba_classifier(use_fast_path=form == "fast")
        if form == "without causal_conv1d":
            simple.causal_conv1d_fn = None
        with torch.no_grad():
            eager = model(images)
        gm = capture(model, images[:1])
        found[form] = {
            "scans": count(gm, SCAN),
            "convs": count(gm, CONV, torch.ops.aten.conv1d.default),
            "difference": float((gm(images) - eager).abs().max()),
        }
    simple.selective_scan_fn = interface.selective_scan_ref  # mamba's own loop, own convolution
    with torch.no_grad():
        oracle = model(images)
    gm = capture(model, images[:1])
    found["the loop"] = {
        "scans": count(gm, SCAN),
        "convs": count(gm, torch.ops.aten.conv1d.default),
        "difference": float((gm(images) - oracle).abs().max()),
    }
    found["restored"] = simple.selective_scan_fn is interface.selective_scan_ref
    compiled = ouro.compile(model, images[:1], ouro.W4A4, calibration=images)
    rows = compiled.report["layers"]["rows"]
    found["status"] = {row["name"]: row["status"] for row in rows}
    found["snr"] = compiled.report["logits_snr_db"]
    return found


def test_unmodified_mamba() -> None:
    if importlib.util.find_spec("mamba_ssm") is None:
        pytest.fail(MAMBA_MISSING, pytrace=False)
    found = run_isolated(_mamba)
    for form in ("fast", "slow", "without causal_conv1d", "the loop"):
        assert found[form]["scans"] == found[form]["convs"] == 1, form
        assert found[form]["difference"] <= 1e-5, form
    assert found["restored"]
    status = found["status"]
    for layer in ("in_proj", "x_proj", "dt_proj", "out_proj"):
        assert status[f"mixer.{layer}"] == "quantized"
    assert status["mixer.selective_scan"] == "simulated"
    assert found["snr"] > 10


def _refusal(call: Callable[[], Any]) -> str:
    try:
        call()
    except UsageError as error:
        return str(error)
    return ""


def _refusals_of_mamba() -> dict[str, str]:
    ouro.install_standins()
    mamba_ssm = importlib.import_module("mamba_ssm")
    model = mamba_ssm.Mamba(16, d_state=4, layer_idx=0)
    x = randn(0, 2, 5, 16)
    u, delta, A, B, C, _, _ = scan_operands()

    def infer(offset: int, tokens: Tensor) -> None:
        cache = types.SimpleNamespace(seqlen_offset=offset, key_value_memory_dict={})
        with torch.no_grad():
            model(tokens, inference_params=cache)

    def last_state() -> Tensor:
        _, state = mamba_ssm.selective_scan_fn(u, delta, A, B, C, return_last_state=True)
        return state + 1

    def slow_training() -> None:
        model.use_fast_path = False
        model(x)

    return {
        "backward": _refusal(lambda: model(x).sum().backward()),
        "gradients": _refusal(slow_training),
        "prefill": _refusal(lambda: infer(0, x)),
        "step": _refusal(lambda: infer(3, x[:, :1])),
        "last state": _refusal(last_state),
        "Mamba2": _refusal(lambda: mamba_ssm.Mamba2(16)),
    }


def test_training_and_states_are_refused() -> None:
    if importlib.util.find_spec("mamba_ssm") is None:
        pytest.fail(MAMBA_MISSING, pytrace=False)
    found = run_isolated(_refusals_of_mamba)
    if importlib.util.find_spec("huggingface_hub") is not None:
        del found["Mamba2"]  # the real one was imported
    for name, sentence in found.items():
        assert "stood in for by ouro_compiler, for inference" in sentence, name
        assert len(sentence.splitlines()) == 1
    assert "torch.no_grad()" in found["backward"]
    assert "torch.no_grad()" in found["gradients"]
    assert "return_last_state" in found["last state"]
    assert "inference_params" in found["prefill"]
    assert "inference_params" in found["step"]


# --- norms


def test_norms_keep_names_and_dtypes() -> None:
    norm = RMSNorm(6, eps=1e-3)
    assert list(norm.state_dict()) == ["weight"]
    x, residual = randn(0, 2, 3, 6).half(), randn(1, 2, 3, 6)
    with torch.no_grad():
        y, total = norm(x, residual=residual, prenorm=True)
        first, kept = norm(x, prenorm=True, residual_in_fp32=True)
    assert (y.dtype, total.dtype) == (torch.float16, torch.float32)
    assert (first.dtype, kept.dtype) == (torch.float16, torch.float32)
    assert_close(total, x.float() + residual, 1e-6)
    assert_close(y, F.rms_norm(total, (6,), eps=1e-3).half(), 1e-3)
    weight, bias = randn(2, 6), randn(3, 6)
    z = layer_norm_fn(residual, weight, bias, eps=1e-5)
    assert_close(z, F.layer_norm(residual, (6,), weight, bias, 1e-5), 1e-5)
    half = residual.half()
    _, kept_half = rms_norm_fn(x, weight.half(), None, half, prenorm=True, residual_in_fp32=True)
    assert kept_half.dtype == torch.float16  # the residual's own, once there is one


def test_norms_refuse_what_they_do_not_do() -> None:
    x, weight = randn(0, 2, 6), randn(1, 6)
    with pytest.raises(UsageError, match="rowscale is not supported"):
        layer_norm_fn(x, weight, None, rowscale=x[0])
    with pytest.raises(UsageError, match="dropout_p is not supported"):
        rms_norm_fn(x, weight, None, dropout_p=0.1)
    with pytest.raises(UsageError, match=r"torch\.no_grad\(\)"):
        layer_norm_fn(x, weight.requires_grad_(), None)


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
