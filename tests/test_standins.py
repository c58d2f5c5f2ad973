"""Stand-ins: modules for missing extensions, functions replaced while a model is captured."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import json
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ouro_compiler as ouro
from ouro_compiler.errors import UsageError
from ouro_compiler.frontend.capture import capture
from ouro_compiler.frontend.standins.norms import RMSNorm, layer_norm_fn, rms_norm_fn
from tests.helpers import MAMBA_MISSING, assert_close, randn
from tests.isolated import run_isolated

SCAN = torch.ops.ouro.selective_scan.default
CONV = torch.ops.ouro.causal_conv1d.default


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
        self.img_size = 32
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
    with tempfile.TemporaryDirectory() as folder:
        compiled.save(Path(folder) / "mamba.pt2")
        again = ouro.load(Path(folder) / "mamba.pt2")
    found["reloaded"] = torch.equal(again(images), compiled(images))
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
    assert found["reloaded"]


def _compile_a_pickle() -> dict[str, Any]:
    """The command in a process whose imports are all its own."""
    ouro.install_standins()
    with tempfile.TemporaryDirectory() as folder:
        torch.save(_mamba_classifier(), f"{folder}/mamba.pt")
        command = [sys.executable, "-m", "ouro_compiler", "compile", f"{folder}/mamba.pt"]
        options = ["--allow-pickle", "--calibration", "noise", "--images", "4", "-q"]
        files = ["-o", f"{folder}/out.pt2", "--report", f"{folder}/report.json"]
        result = subprocess.run(
            [*command, *options, *files], capture_output=True, text=True, check=False
        )
        written = Path(f"{folder}/report.json")
        layers = json.loads(written.read_text())["layers"] if written.exists() else {}
        return {"code": result.returncode, "stderr": result.stderr[-500:], "layers": layers}


def test_the_command_installs_the_standins() -> None:
    if importlib.util.find_spec("mamba_ssm") is None:
        pytest.fail(MAMBA_MISSING, pytrace=False)
    found = run_isolated(_compile_a_pickle)
    assert found["code"] == 0, found["stderr"]
    assert found["layers"]["quantized"] == 5


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
