"""Suite "cpu" on the smallest model: what its rows hold, and that wrong results get no time."""

from __future__ import annotations

import argparse
import json

import pytest
import torch
from torch import Tensor, nn

from benchmarks import checks, cpu, cpu_kernels, kernel_cases, peers
from benchmarks.ceilings import Work, measure_ceilings, shortest_seconds
from benchmarks.cpu_models import VARIANTS, measure_model
from benchmarks.cpu_table import tables
from benchmarks.subjects import Built, Subject, Variant
from benchmarks.timing import Candidate, summary, take_turns
from ouro_compiler.kernels.cpp.toolchain import find_toolchain
from tests.helpers import mamba_selective_scan_ref, randn

MODEL_KEYS = {
    *("kind", "model", "batch", "variant", "note", "check", "reason", "build_seconds"),
    *("ms", "ms_min", "ms_q1", "ms_q3", "ms_max", "calls", "images_per_second"),
    *("vs_mamba", "vs_compile", "vs_onnx"),
}


@pytest.fixture(scope="module")
def rows() -> list[dict[str, object]]:
    options = argparse.Namespace(
        batches="1",
        filter=r"ceilings|kernels/b1/linear Vim-T dt_proj|vim_micro/b1/(eager|ours W4A4 ssm none)",
        models="vim_micro",
        images=2,
        rounds=1,
        json=None,
        artefacts=None,
    )
    return cpu.cpu(options)


def test_rows_of_the_suite(rows: list[dict[str, object]]) -> None:
    assert json.loads(json.dumps(rows)) is not None
    kinds = [row["kind"] for row in rows]
    assert kinds[0] == "machine"
    assert set(kinds) == {"machine", "ceiling", "kernel", "model"}
    models = [row for row in rows if row["kind"] == "model"]
    assert [row["variant"] for row in models] == [
        "eager, mamba_ssm reference scan",
        "eager, our scan",
        "ours W4A4 ssm none",
    ]
    for row in models:
        assert set(row) == MODEL_KEYS
        assert row["reason"] is None
        assert 0 < row["ms_min"] <= row["ms_q1"] <= row["ms"] <= row["ms_q3"] <= row["ms_max"]
        assert row["images_per_second"] == pytest.approx(1e3 / row["ms"])
        assert row["vs_mamba"] == pytest.approx(models[0]["ms"] / row["ms"])
        assert row["vs_onnx"] is None  # not among the variants of this run


@pytest.mark.skipif(find_toolchain() is None, reason="no C++ compiler")
def test_kernels_have_shares_of_the_ceilings(rows: list[dict[str, object]]) -> None:
    kernels = [row for row in rows if row["kind"] == "kernel"]
    assert [row["name"] for row in kernels] == ["F.linear fp32", "W4A4", "W4A8", "W8A8"]
    for row in kernels:
        assert row["reason"] is None
        assert row["ms"] > 0
        assert row["share"] == pytest.approx(row["bound_ms"] / row["ms"])
        assert row["vs_linear"] == pytest.approx(kernels[0]["ms"] / row["ms"])


def test_tables_show_every_row(rows: list[dict[str, object]]) -> None:
    shown = tables(rows)
    assert "### vim_micro, batch 1" in shown
    assert "### linear Vim-T dt_proj, batch 1" in shown
    assert shown.count("\n| ours W4A4 ssm none |") == 1
    lines = [line for line in shown.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 3  # three kinds of tables


def _zeros(subject: Subject, images: Tensor) -> Built:
    with torch.no_grad():
        shape = subject.model(images).shape
    return Built(lambda given: torch.zeros(shape))


def _broken(subject: Subject, images: Tensor) -> Built:
    raise peers.UnavailableError("it is not installed")


def test_wrong_and_missing_variants_get_no_time() -> None:
    variants = {
        "zeros, fp32": Variant("fp32", _zeros),
        "zeros, bf16": Variant("bf16", _zeros),
        "scan of zeros": Variant(
            "fp32",
            lambda subject, images: Built(
                subject.model,
                context=lambda: peers.operators_by(
                    {"selective_scan": lambda u, *_: u.new_zeros(u.shape)}
                ),
            ),
        ),
        "noise": Variant("integer", lambda subject, images: Built(lambda given: randn(1, 1, 10))),
        "missing": Variant("fp32", _broken),
        "right": VARIANTS["eager, our scan"],
    }
    rows = measure_model("vim_micro", [1], rounds=1, variants=variants)
    *wrong, right = rows
    assert all(row["ms"] is None and row["images_per_second"] is None for row in wrong)
    assert all(row["reason"] and row["check"] is None for row in wrong)
    assert wrong[-1]["reason"] == "it is not installed"
    assert right["ms"] > 0
    assert "no time: it is not installed" in tables(rows)


def test_a_wrong_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        kernel_cases,
        "function_on",
        lambda device, name: lambda codes, *rest: torch.zeros(*codes.shape[:2], rest[4].shape[0]),
    )
    groups = kernel_cases.chosen_groups([1], "linear Vim-T dt_proj")
    rows = cpu_kernels.measure_kernels(groups, [], rounds=1)
    assert [row["ms"] is None for row in rows] == [False, True, True, True]
    assert "is not the reference's" in rows[1]["reason"]


def test_quantized_results_must_repeat() -> None:
    x = randn(1, 4, 10)
    assert "repeats" in checks.check_integer(x + 1e-3, x + 1e-3, x)
    for found, again in ((x, x + 1e-6), (x.fill_(float("nan")), x)):
        with pytest.raises(checks.WrongError):
            checks.check_integer(found.clone(), again, randn(1, 4, 10))


def test_mambas_function_out_of_its_file() -> None:
    reference, found = mamba_selective_scan_ref(), peers.mamba_scan()
    u, delta, z = randn(1, 2, 6, 9), randn(2, 2, 6, 9), randn(3, 2, 6, 9)
    A, B, C = -randn(4, 6, 3).exp(), randn(5, 2, 3, 9), randn(6, 2, 3, 9)
    args = (A, B, C, randn(7, 6), z, randn(8, 6), True)
    assert torch.equal(found(u, delta, *args), reference(u, delta, *args))
    with peers.operators_by({"selective_scan": found}):
        backwards = torch.ops.ouro.selective_scan(u, delta, *args, True)
    assert torch.allclose(
        backwards, torch.ops.ouro.selective_scan(u, delta, *args, True), atol=1e-5
    )


def test_plain_operators_are_put_back() -> None:
    before = torch.ops.ouro.add_norm
    with peers.plain_operators():
        assert torch.ops.ouro.add_norm is not before
    assert torch.ops.ouro.add_norm is before


def test_turns_and_their_summary() -> None:
    log: list[str] = []
    candidates = [
        Candidate(name, lambda name=name: log.append(name))  # type: ignore[misc]
        for name in "ab"
    ]
    take_turns(candidates, 2)
    order = [name for last, name in zip(["", *log], log, strict=False) if name != last]
    assert order == list("ababab")  # warming up, then two rounds
    assert summary([0.002])["ms_q1"] == summary([0.002])["ms_max"] == 2
    assert summary([0.001, 0.002, 0.003])["ms"] == pytest.approx(2)


@pytest.mark.skipif(find_toolchain() is None, reason="no C++ compiler")
def test_ceilings_bound_work() -> None:
    ceilings = measure_ceilings(seconds=0.001, times=1)
    assert all((row["per_second"] or 1) > 0 for row in ceilings)
    one = shortest_seconds(Work(fma=1e6), ceilings)
    two = shortest_seconds(Work(fma=1e6, exp=1e6, moved=1), ceilings)
    assert one is not None
    assert two is not None
    assert one[0] < two[0]
    assert shortest_seconds(Work(fma=1), []) is None


def test_onnx_has_one_scan_node_a_scan() -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from benchmarks.peers_onnx import onnx_runtime

    class Two(nn.Module):
        def forward(self, u: Tensor) -> Tensor:
            for reverse in (False, True):
                u = torch.ops.ouro.selective_scan(
                    *(u, u, -torch.ones(6, 3), u[:, None, :3], u[:, None, 3:]),
                    *(torch.ones(6), u, torch.ones(6), True, reverse),
                )
            return u

    u = randn(1, 2, 6, 9)
    found = onnx_runtime(Two().eval(), u, 2)(u)
    checks.check_fp32(found, Two()(u))
    with pytest.raises(peers.UnavailableError, match="has 2 Scan nodes"):
        onnx_runtime(Two().eval(), u, 3)
