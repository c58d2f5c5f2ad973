"""The command line: results, exit codes, one sentence for each failure, and nothing left behind."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import ouro_compiler as ouro
from ouro_compiler.cli import compile_main, main
from tests.command_line import Cli, cli, refused
from tests.models import compiled_vim, images, small_vim

__all__ = ["cli"]  # a fixture


def test_compile_verify_report(cli: Cli) -> None:
    args = ("--w4a4", "--calibration", "images.npz", "--verify", "test.npz", "--report", "r.json")
    result = cli("vim.safetensors", *args, "-o", "out.pt2")
    assert result.code == 0, result.err
    assert "8 of 12 (2 simulated)" in result.out
    assert result.out.strip().splitlines()[-1] == "out.pt2"
    assert result.err == ""
    report = json.loads(Path("r.json").read_text())
    assert report["schema_version"] == 1
    assert report["accuracy"]["before"] == 1.0  # the labels are the model's own answers
    assert 0 <= report["accuracy"]["after"] <= 1
    assert report["layers"]["quantized"] == 8
    assert report["layers"]["total"] == 12
    assert set(report["layers"]["skipped"][0]) == {"name", "reason", "selected"}
    assert report["bytes"]["stored"] < report["bytes"]["fp16"]
    assert report["snr_data"] == "12 images of test.npz"
    assert set(report["seconds"]) == {"capture", "reference", "calibrate", "quantize", "measure"}
    loaded = ouro.load("out.pt2")
    assert loaded(images(2)).shape == (2, 10)
    assert loaded.manifest["preprocessing"]["size"] == 28


def test_default_output_name_and_quiet(cli: Cli) -> None:
    result = cli("vim.safetensors", "--w8a8", "--calibration", "noise", "--images", "4", "-q")
    assert (result.code, result.out, result.err) == (0, "", "")
    assert Path("vim.w8a8.pt2").is_file()


def test_precompile_fills_the_caches_and_says_what_kernels_take(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton

    monkeypatch.setenv("OURO_CACHE_DIR", str(tmp_path / "sources"))
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path / "binaries")
        args = ("--target", "cuda", "--calibration", "images.npz", "--ssm", "none")
        result = cli("vim.safetensors", *args, "--precompile", "sm_90", "--report", "r.json")
    assert result.code == 0, result.err
    rows = json.loads(Path("r.json").read_text())["precompiled"]
    sources = {path.name for path in (tmp_path / "sources").rglob("*.py")}
    assert len(list((tmp_path / "binaries").rglob("*.cubin"))) == len(rows) >= len(sources) > 8
    assert all(row["arch"] == 90 and row["spills"] == 0 for row in rows)
    assert {row["digest"][:8] for row in rows} <= set(re.findall(r"\((\w{8})\)", result.out))
    assert "registers" in result.out
    manifest = ouro.load("vim.w4a4.pt2").manifest
    assert "precompiled" not in manifest["report"], "times stay out of the artefact"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--precompile", "sm_90"), "needs --target cuda"),
        (("--precompile", "sm_75", "--target", "cuda"), "sm_75 is no architecture of: sm_80"),
        (("--precompile", "", "--target", "cuda"), "an empty name is no architecture"),
    ],
)
def test_precompile_refuses_before_any_work(cli: Cli, args: tuple[str, ...], words: str) -> None:
    refused(cli("vim.safetensors", "--calibration", "images.npz", *args), 2, words)


def test_cuda_artefact_needs_no_gpu(cli: Cli) -> None:
    args = ("--target", "cuda", "--calibration", "images.npz", "--ssm", "none")
    result = cli(
        "vim.safetensors",
        *args,
        "--outliers",
        "static",
        "--inlier-scale",
        "per-tensor",
        "-o",
        "c.pt2",
    )
    assert result.code == 0, result.err
    manifest = ouro.load("c.pt2").manifest
    assert manifest["target"] == "cuda"
    assert manifest["config"]["ssm"] == "none"
    assert manifest["config"]["activations"]["outliers"] == "static"
    assert manifest["config"]["activations"]["inlier_scale"] == "per_tensor"


def test_dry_run_writes_nothing(cli: Cli) -> None:
    result = cli("vim.safetensors", "--dry-run")
    assert result.code == 0, result.err
    assert "out_proj" in result.out
    assert not list(Path().glob("*.pt2"))


def test_verbose_logs_passes(cli: Cli) -> None:
    result = cli("vim.safetensors", "--dry-run", "-v")
    assert result.code == 0
    assert "fold_delta_bias: changed" in result.err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("vim.safetensors", "--calibration", "noise", "--iterations", "3"), "synthetic images"),
        (("generate", "vim.safetensors", "-o", "."), "holds other files"),
        (("generate", "vim.safetensors", "-o", "no/where"), "existing folder"),
        (("generate", "vim.safetensors", "-o", "vim.safetensors"), "not a folder"),
        (("generate", "vim.safetensors", "-o", "out", "-q", "-v"), "choose one of"),
        (("vim.safetensors", "--w4a4", "--w8a8"), "choose one of --w4a4 and --w8a8"),
        (("vim.safetensors", "-q", "-v"), "choose one of"),
        (("vim.safetensors", "--calibration", "gone.npz"), "gone.npz"),
        (("vim.safetensors", "--calibration", "vim.safetensors"), "images"),
        (("vim.safetensors", "--calibration", "noise", "--max-drop", "1"), "--verify"),
        (("vim.safetensors", "--calibration", "noise", "--verify", "images.npz"), "no labels"),
        (("vim.safetensors", "--calibration", "noise", "-o", "no/where.pt2"), "existing folder"),
        (("vim.safetensors", "--calibration", "noise", "--arch", "resnet"), "resnet"),
    ],
)
def test_usage_errors_exit_2(cli: Cli, args: tuple[str, ...], words: str) -> None:
    entry = main if args[0] == "generate" else compile_main
    refused(cli(*args, entry=entry), 2, words)


def test_unknown_option_exits_2(cli: Cli) -> None:
    assert cli("vim.safetensors", "--w3a3").code == 2
    assert cli("generate", "vim.safetensors", "-o", "out", "--images", "0", entry=main).code == 2


@pytest.mark.parametrize("kind", ["missing", "truncated", "text", "folder", "nan", "shape"])
def test_bad_models_exit_3(cli: Cli, kind: str) -> None:
    path = Path("bad.safetensors")
    whole = Path("vim.safetensors").read_bytes()
    state = {name: tensor.clone() for name, tensor in small_vim().state_dict().items()}
    if kind == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "text":
        path.write_text("not a model")
    elif kind == "folder":
        path.mkdir()
    elif kind == "nan":
        state["norm_f.weight"][3] = float("nan")
        save_file(state, path)
    elif kind == "shape":
        state["layers.0.mixer.D"] = torch.ones(5)
        save_file(state, path)
    refused(cli("bad.safetensors", "--w4a4", "--calibration", "noise"), 3, "bad.safetensors")


class Foreign(torch.nn.Module):
    """A model that must be unpickled to be opened."""

    def __init__(self) -> None:
        super().__init__()
        self.img_size = 8
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.flatten(1, 2)).mean(1)


def test_pickles_need_the_flag(cli: Cli) -> None:
    torch.save(Foreign(), "foreign.pt")
    args = ("foreign.pt", "--calibration", "noise", "--images", "4", "-o", "f.pt2")
    refused(cli(*args), 3, "--allow-pickle")
    assert cli(*args, "--allow-pickle").code == 0


class Untraceable(Foreign):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) if x.sum() > 0 else x


def test_untraceable_exits_3(cli: Cli) -> None:
    torch.save(Untraceable(), "u.pt")
    result = cli("u.pt", "--calibration", "noise", "--allow-pickle")
    refused(result, 3, "cannot trace Untraceable")


class RunTimeWeight(Foreign):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(1, 2)
        return torch.nn.functional.linear(tokens, self.linear(tokens)[0, :8]).mean(1)


def test_strict_refusal_exits_4(cli: Cli) -> None:
    torch.save(RunTimeWeight(), "r.pt")
    args = ("r.pt", "--calibration", "noise", "--allow-pickle", "--images", "4")
    refused(cli(*args, "--strict"), 4, "computed at run time")
    refused(cli(*args, "--strict", "--dry-run"), 4, "computed at run time")
    result = cli(*args, "-o", "r.pt2")
    assert result.code == 0
    assert "REFUSED" in result.out


def test_too_large_a_drop_exits_5(cli: Cli) -> None:
    many = images(200, seed=6)
    np.savez("many.npz", images=many.numpy(), labels=small_vim()(many).argmax(1).numpy())
    args = ("vim.safetensors", "--calibration", "images.npz", "--verify", "many.npz", "--w4a4")
    # The labels are the model's own answers, and four bits change some of them.
    result = cli(*args, "--max-drop", "0", "--report", "r.json", "-q")
    accuracy = json.loads(Path("r.json").read_text())["accuracy"]
    assert accuracy["after"] < accuracy["before"] == 1.0
    refused(result, 5, "accuracy fell by")
    assert cli(*args, "--max-drop", "100", "-o", "ok.pt2").code == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is there")
def test_missing_device_exits_6(cli: Cli) -> None:
    args = ("--calibration", "noise", "--target", "cuda", "--verify", "test.npz")
    refused(cli("vim.safetensors", *args), 6, "no CUDA device")
    generate = ("generate", "vim.safetensors", "-o", "out", "--device", "cuda")
    refused(cli(*generate, entry=main), 6, "no CUDA device")
    assert not Path("out").exists()


def test_inspect_artefact_and_model(cli: Cli) -> None:
    compiled_vim().save("m.pt2")
    text = cli("inspect", "m.pt2", entry=main)
    assert text.code == 0, text.err
    assert "ouro.linear_dynamic" in text.out
    found = json.loads(cli("inspect", "m.pt2", "--format", "json", entry=main).out)
    linears = [n for n in found["nodes"] if n["op"] == "ouro.linear_dynamic_outlier"]
    quantizers = [n for n in found["nodes"] if n["op"] == "ouro.quantize_dynamic_outlier"]
    assert len(linears) == 6
    assert all(n["bits"] == 4 and n["scale"]["median"] > 0 for n in linears)
    assert all(0 <= n["outlier_share"] <= 1 for n in quantizers)
    model = ("inspect", "vim.safetensors", "--format", "json")
    plain = json.loads(cli(*model, entry=main).out)
    assert plain["after"] == "share_views"
    assert sum(n["op"] == "aten.linear" for n in plain["nodes"]) == 7
    after = json.loads(cli(*model, "--after", "insert_quantize_dequantize", entry=main).out)
    assert sum(n["op"] == "ouro.quantize_dynamic_outlier" for n in after["nodes"]) == 12
    refused_pass = cli("inspect", "vim.safetensors", "--after", "no_such_pass", entry=main)
    assert refused_pass.code == 2
    assert "remove_noops" in refused_pass.err


def test_help_names_the_exit_codes(cli: Cli) -> None:
    result = cli("--help")
    assert result.code == 0
    assert "Exit codes" in result.out
