"""Suite "gpu" without one: its rows, checks and tables on a CPU with small models."""

from __future__ import annotations

import argparse
import dataclasses
import json
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import ouro_compiler as ouro
from benchmarks import gpu, gpu_models, peers, peers_build, peers_cuda
from benchmarks.ceilings import ceiling_row
from benchmarks.gpu_kernels import check_kernel, gpu_ceilings, measure_gpu_kernels
from benchmarks.gpu_models import EAGER, PACKAGES, VARIANTS, measure_models, row_name
from benchmarks.gpu_probe import Probe, bytes_of
from benchmarks.gpu_table import tables
from benchmarks.gpu_tuning import tune_models, tuned_variants
from benchmarks.kernel_cases import Group, Kernel, all_groups
from benchmarks.resume import Rows
from benchmarks.subjects import Built, Subject, Variant
from benchmarks.timing import Candidate, take_turns
from ouro_compiler.ops.causal_conv1d import causal_conv1d_ref
from ouro_compiler.ops.selective_scan import selective_scan_ref
from tests.helpers import assert_close, randn

CPU = torch.device("cpu")


def small_ceilings(device: torch.device) -> list[dict[str, Any]]:
    return gpu_ceilings(device, side=32, copied=1 << 16)


def group(name: str, batch: int) -> Group:
    return next(one for one in all_groups(batch, ("Vim-T",)) if one.name == name)


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("artefacts")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory, artefacts: Path) -> list[dict[str, Any]]:
    """Two runs, of which the second goes on: it compiles nothing again."""
    path = tmp_path_factory.mktemp("gpu") / "rows.json"
    small = Group("scan", 3, _small_scan)
    for pattern in ("b1/eager|kernels", "ours W4A4|eager"):
        found = Rows(path, "gpu", pattern)
        measure_gpu_kernels(found, [small], rounds=1, device="cpu", measure_ceilings=small_ceilings)
        measure_models(
            *(found, ["vim_micro"], [1]), images=2, rounds=1, device="cpu", artefacts=artefacts
        )
    return json.loads(path.read_text())["rows"]


def _small_scan(make: Any, batch: int) -> dict[str, Kernel]:
    x = randn(0, 2, 6, 9)[torch.arange(batch) % 2]
    work = {"fma": 100.0, "products": "int8"}
    args = (x, x, -torch.ones(6, 3), x[:, :3], x[:, 3:], torch.ones(6), None, None, True, False)
    return {"fp32": make.operator("selective_scan", args, **work)}


def test_rows(rows: list[dict[str, Any]]) -> None:
    by_name = {row["row"]: row for row in rows}
    assert len(by_name) == len(rows), "a row that was made again replaces the old one"
    assert {row["kind"] for row in rows} == {"ceiling", "kernel", "model"}
    models = [row for row in rows if row["kind"] == "model"]
    measured = {row["variant"] for row in models if row["reason"] is None}
    assert measured == {EAGER, "ours W4A4"}
    for row in models:
        if row["reason"] is None:
            assert row["check"]
            assert row["ms_q1"] <= row["ms"] <= row["ms_q3"]
            assert row["images_per_second"] == pytest.approx(1e3 / row["ms"])
            assert row["weights_bytes"] > 0
        else:
            assert row["ms"] is row["check"] is row["images_per_second"] is None
    reason = by_name[row_name("vim_micro", 1, PACKAGES)]["reason"]
    assert reason.startswith("selective_scan_cuda cannot be imported")
    assert by_name[row_name("vim_micro", 1, f"{EAGER}, CUDA graph")]["reason"] == (
        "CUDA graphs need a GPU"
    )
    ours, eager = (
        by_name[row_name("vim_micro", 1, one)]["weights_bytes"] for one in ("ours W4A4", EAGER)
    )
    assert ours < 0.6 * eager


@pytest.mark.usefixtures("rows")
def test_artefacts_are_compiled_once(artefacts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_again(*_: Any, **__: Any) -> None:
        raise AssertionError("it was compiled again")

    monkeypatch.setattr("benchmarks.subjects.ouro.compile", compile_again)
    assert [one.name for one in artefacts.iterdir()] == ["vim_micro_w4a4_params.pt2"]
    config = dataclasses.replace(ouro.W4A4, ssm="params")
    model, said = Subject("vim_micro", 2, "cpu", artefacts).compiled(config)
    assert "kinds of operators equal their references" in said
    assert model.report["config"]["ssm"] == "params"


@pytest.mark.slow
def test_ours_in_half_precision() -> None:
    found = Rows(None, "gpu", "ours fp16")
    measure_models(found, ["vim_micro"], [1], images=2, rounds=1, device="cpu")
    (row,) = found.rows
    assert row["reason"] is None
    assert row["check"].startswith("relative L2 error 0")


def test_rows_say_whose_blocks_they_ran_with(rows: list[dict[str, Any]]) -> None:
    blocks = {row["variant"]: row["blocks"] for row in rows if row["kind"] == "model"}
    assert blocks["ours W4A4"] == "default"
    assert blocks[EAGER] is None
    assert {row["blocks"] for row in rows if row["kind"] == "kernel"} == {"default"}


def test_tuned_rows(artefacts: Path) -> None:
    """Under names of their own; a model that could not be tuned says why."""
    found = Rows(None, "gpu", "W4A4, tuned")
    given = {"images": 2, "device": "cpu", "artefacts": artefacts}
    tune_models(found, ["vim_micro"], [1], seconds=1.0, **given)
    (row,) = found.rows
    assert (row["row"], row["kind"]) == ("gpu/vim_micro/tuning/ours W4A4", "tuning")
    if not torch.cuda.is_available():
        assert "this machine has no CUDA device" in row["reason"]
        assert "Not tuned: DeviceError: kernels are tuned on" in tables(found.rows)
    names = {f"{one}, tuned" for one in ("ours W8A8", "ours W4A8", "ours W4A4")}
    assert set(tuned_variants()) == names
    eager = Variant("fp16", lambda subject, images: Built(subject.model))
    variants = dict.fromkeys(names, eager)
    measure_models(found, ["vim_micro"], [1], rounds=1, variants=variants, **given)
    assert found.rows[-1]["row"] == row_name("vim_micro", 1, "ours W4A4, tuned")
    assert found.rows[-1]["blocks"] == "tuned"
    before = list(found.rows)
    tune_models(found, ["vim_micro"], [1], seconds=1.0, **given)
    assert found.rows == before, "nothing is tuned for rows that are there"


def test_what_was_tuned_is_a_table() -> None:
    kernel = {"kernel": "quantize 4/8", "shape": "197 x 384", "batch": 1, "default_us": 10.04}
    kernel |= {"ratio": 0.9, "best": {"num_warps": 4}, "tried": 3, "left": 1}
    kernel |= {"refused": {"spills registers": 2}}
    row = {"row": "gpu/m/tuning/ours W4A4", "kind": "tuning", "model": "m", "variant": "ours W4A4"}
    text = tables([{**row, "reason": None, "kernels": [kernel]}])
    assert "### m, ours W4A4: tuning" in text
    line = "| quantize 4/8 | 1, 197 x 384 | 10.0 | 0.90 | warps 4 | 3 of 4 | 2 spills registers |"
    assert line in text


def test_kernels_have_rates_and_a_share(rows: list[dict[str, Any]]) -> None:
    (row,) = (row for row in rows if row["kind"] == "kernel")
    assert row["row"] == "gpu/kernels/b3/scan/fp32"
    assert row["check"] == "equals its reference, 3 samples"
    seconds = row["ms"] / 1e3
    assert row["bytes_per_second"] == pytest.approx(row["work"]["moved"] / seconds)
    assert row["operations_per_second"] == pytest.approx(200 / seconds)
    rates = {one["name"]: one["per_second"] for one in rows if one["kind"] == "ceiling"}
    bound = max(row["work"]["moved"] / rates["memory"], 100 / rates["fma"])
    assert row["share"] == pytest.approx(bound / seconds)


def test_tables(rows: list[dict[str, Any]]) -> None:
    shown = tables(rows)
    assert "### vim_micro, batch 1" in shown
    assert "### scan, batch 3" in shown
    assert "no time: CUDA graphs need a GPU" in shown
    lines = [line for line in shown.splitlines() if line.startswith("|")]
    assert len(lines) == len(rows) + 2 * 3
    widths = {line.count("|") for line in lines}
    assert widths == {4, 11}
    fast = {**next(row for row in rows if row.get("variant") == EAGER), "ms": 2.0}
    graph = {**fast, "variant": f"{EAGER}, CUDA graph", "ms": 1.0, "peak_bytes": 3_000_000}
    line = next(one for one in tables([fast, graph]).splitlines() if one.startswith(f"| {EAGER} |"))
    assert "| 0.50 |" in line


def test_the_machine_is_named() -> None:
    row = {"kind": "machine", "gpu": "G", "capability": "9.0", "memory_bytes": 1e11}
    row |= {"torch": "2", "cuda": "13", "packages": {"triton": "3", "mamba_ssm": None}}
    assert "G (sm_90, 100 GB); torch 2, CUDA 13, triton 3." in tables([row])


def test_every_variant_that_was_asked_for() -> None:
    assert len(VARIANTS) == 9
    assert {one.kind for one in VARIANTS.values()} == {"fp16", "integer"}
    assert sum("CUDA graph" in name for name in VARIANTS) == 2
    assert {"ours W8A8", "ours W4A8", "ours W4A4"} < set(VARIANTS)


def test_wrong_results_get_no_numbers(tmp_path: Path) -> None:
    """And they are tried again, last, in the next run."""
    order: list[str] = []

    def zeros(subject: Subject, images: Tensor) -> Built:
        order.append("zeros")
        return Built(lambda given: torch.zeros(len(given), 10))

    def right(subject: Subject, images: Tensor) -> Built:
        order.append("right")
        return Built(subject.model)

    def shifted(subject: Subject, images: Tensor) -> Built:
        return Built(subject.model, on_cpu=lambda given: -subject.model(given))

    def one_way(subject: Subject, images: Tensor) -> Built:
        kernels = {"selective_scan": lambda *args: selective_scan_ref(*args[:9])}
        return Built(subject.model, context=lambda: peers.operators_by(kernels))

    wrong = {"zeros": Variant("fp16", zeros), "shifted": Variant("integer", shifted)}
    wrong["one way"] = Variant("fp16", one_way)
    path = tmp_path / "rows.json"
    for variants in (wrong, {**wrong, "right": Variant("fp16", right)}):
        found = Rows(path, "gpu")
        measure_models(
            found, ["vim_micro"], [2], images=2, rounds=1, device="cpu", variants=variants
        )
    way, first, second, third = sorted(found.rows, key=lambda row: row["variant"])
    assert "relative L2 error" in way["reason"], "a scan that knows one direction only"
    assert first["reason"] is None
    assert "its logits are not those of the CPU" in second["reason"]
    assert "relative L2 error 100.0%" in third["reason"]
    assert second["ms"] is third["ms"] is third["peak_bytes"] is None
    assert order == ["zeros", "right", "zeros"]


def test_a_kernel_that_is_wrong_or_depends_on_the_place_is_refused() -> None:
    case = Group("scan", 4, _small_scan)
    kernel, reference = case.kernels(CPU)["fp32"], case.references()["fp32"]
    assert check_kernel(kernel, reference, 4)
    right = kernel.call()
    for change, message in ((0, "not the reference's"), (3, "depends on its place in a batch")):
        changed = right.clone()
        changed[change] += 1
        wrong = Kernel(lambda changed=changed: changed, *_rest(kernel))  # type: ignore[misc]
        with pytest.raises(Exception, match=message):
            check_kernel(wrong, reference, 4)


def _rest(kernel: Kernel) -> tuple[Any, ...]:
    return kernel.work, kernel.implementation, kernel.name, kernel.reference


def test_a_group_that_cannot_be_built_is_a_row() -> None:
    def broken(make: Any, batch: int) -> dict[str, Kernel]:
        raise RuntimeError("out of memory")

    found = Rows(None, "gpu")
    one = ceiling_row("memory", "copies", 1.0, None)
    measure_gpu_kernels(
        *(found, [Group("broken", 1, broken)]),
        rounds=1,
        device="cpu",
        measure_ceilings=lambda device: [{"row": "gpu/ceilings/memory", "seed": None, **one}],
    )
    assert found.rows[-1]["row"] == "gpu/kernels/b1/broken/all"
    assert found.rows[-1]["reason"] == "RuntimeError: out of memory"
    assert "no time: RuntimeError: out of memory" in tables(found.rows)


def test_linears_of_two_samples_stand_for_all() -> None:
    case = group("linear Vim-T dt_proj", 3)
    kernels, references = case.kernels(CPU), case.references()
    for name in ("W4A4", "W8A8", "F.linear fp32"):
        assert check_kernel(kernels[name], references[name], 3)
    assert kernels["W4A4"].call().shape == (3, 197, 384)


def test_rows_that_failed_stay_until_they_are_made() -> None:
    found = Rows(None, "gpu", "a")
    found.add({"row": "a", "seed": None, "reason": "no"})
    assert found.wants("a", None)
    assert found.failed("a", None)
    assert not found.wants("b", None)
    found.add({"row": "a", "seed": None, "reason": None})
    assert not found.wants("a", None)
    assert not found.failed("a", None)
    assert len(found.rows) == 1


def test_the_packages_kernels_see_what_they_take() -> None:
    """Stand-ins compute with references and refuse the layouts that the kernels refuse."""

    def fwd(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *rest: Any) -> list[Tensor]:
        D, z, bias, softplus = rest
        for one in (u, delta, B, C, *(() if z is None else (z,))):
            assert one.stride(-1) == 1
            assert one.dtype == u.dtype
        assert A.dtype == D.dtype == bias.dtype == torch.float32
        assert B.dim() == C.dim() == 4
        plain = selective_scan_ref(u, delta, A, B, C, D, None, bias, softplus)
        if z is None:
            return [plain, A]
        return [plain, A, selective_scan_ref(u, delta, A, B, C, D, z, bias, softplus)]

    def causal_conv1d_fwd(x: Tensor, weight: Tensor, bias: Any, *rest: Any) -> None:
        _, _, y, _, silu = rest
        assert x.stride(2) == y.stride(2) == 1 or x.stride(1) == y.stride(1) == 1
        y.copy_(causal_conv1d_ref(x, weight, bias, silu))

    scan = peers_cuda._scan_by(SimpleNamespace(fwd=fwd))
    convolve = peers_cuda._convolution_by(SimpleNamespace(causal_conv1d_fwd=causal_conv1d_fwd))
    u, delta, z = (randn(seed, 2, 9, 8).transpose(1, 2) for seed in range(3))
    B, C = (randn(seed, 2, 9, 3).transpose(1, 2) for seed in (3, 4))
    A, ones = -torch.ones(8, 3), torch.ones(8)
    weight = randn(5, 8, 4)
    for reverse in (False, True):
        for gate in (z, None):
            args = (u, delta, A, B, C, ones, gate, ones, True, reverse)
            assert_close(scan(*args), selective_scan_ref(*args), 1e-6)
        for x in (u, u.contiguous(), u[:, :6]):
            taps = weight[: x.shape[1]]
            expected = causal_conv1d_ref(x, taps, None, True, reverse)
            assert_close(convolve(x, taps, None, True, reverse), expected, 1e-6)


def test_without_the_packages_the_reason_says_so() -> None:
    with pytest.raises(peers.UnavailableError, match="selective_scan_cuda cannot be imported"):
        peers_cuda.cuda_kernels()


def test_sources_of_the_packages_are_made_ready(tmp_path: Path) -> None:
    """The kernels that are left out get definitions, once however often it is unpacked."""
    package = peers_build.PACKAGES[0]
    with pytest.raises(
        SystemExit, match=r"mamba_ssm-.*tar\.gz is not in .*: run `peers_build fetch"
    ):
        peers_build.unpack(package, tmp_path)
    root = tmp_path / package.archive.removesuffix(".tar.gz")
    (root / package.folder).mkdir(parents=True)
    (root / package.folder / package.sources[0]).write_text("// the binding\n")
    (root / "mamba_ssm").mkdir()
    (root / "mamba_ssm" / "scan.py").write_text("scan = 1\n")
    with tarfile.open(tmp_path / package.archive, "w:gz") as archive:
        archive.add(root, root.name)
    for _ in range(2):
        text = (peers_build.unpack(package, tmp_path) / package.sources[0]).read_text()
    assert text.startswith("// the binding")
    assert text.count("void selective_scan_bwd_cuda(SSMParamsBwd &, cudaStream_t) {") == 1
    assert (tmp_path / "mamba_ssm" / "scan.py").exists()


def test_repeats_divide_the_time() -> None:
    one = Candidate("", lambda: None, repeats=20)
    take_turns([one], 1, clock=lambda call: 2.0)
    assert one.seconds == [0.1]


def test_bytes_of_shared_parameters_count_once() -> None:
    linear = torch.nn.Linear(4, 4)
    assert bytes_of(torch.nn.Sequential(linear, linear)) == 4 * 20
    assert Probe(CPU).launches(lambda: None) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_suite_says_so() -> None:
    options = argparse.Namespace(json=None, filter=None, batches=None, models=None)
    with pytest.raises(SystemExit, match="suite gpu needs a CUDA device, and this machine has non"):
        gpu.gpu(options)
    assert gpu_models.VARIANTS is VARIANTS


@pytest.mark.gpu
def test_gpu_a_row_of_a_small_model(tmp_path: Path) -> None:
    """Every number is there; the whole path runs."""
    path = tmp_path / "rows.json"
    options = argparse.Namespace(
        json=path,
        filter="vim_micro/b2/(eager fp16, our scan|ours)|kernels/b2/scan Vim-T",
        batches="2",
        models="vim_micro",
        images=2,
        rounds=1,
        artefacts=tmp_path / "artefacts",
        tune=None,
    )
    found = gpu.gpu(options)
    reasons = {row["row"]: row["reason"] for row in found if row["reason"] is not None}
    assert reasons == {}
    models = [row for row in found if row["kind"] == "model"]
    assert len(models) == 6
    for row in models:
        assert row["launches"] > 0
        assert row["peak_bytes"] > 0
    assert tables(found)
