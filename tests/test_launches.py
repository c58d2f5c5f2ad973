"""Suite "launches" on the smallest model; its estimates against counts made by hand."""

from __future__ import annotations

import argparse
import json

import pytest

from benchmarks.launches import launches, measure
from benchmarks.offline import BATCH, LENGTH, WINDOWS, linear_case, recorded, scan_case
from benchmarks.roofline import (
    BETWEEN_LAUNCHES,
    CYCLES_A_TOKEN,
    CYCLES_A_TOKEN_ALONE,
    GPUS,
    Work,
    work_of,
)
from ouro_compiler.errors import UsageError
from ouro_compiler.kernels.grouping import join


@pytest.fixture(scope="module")
def rows() -> list[dict[str, object]]:
    (found,) = measure("vim_micro", "none", [2])
    return found


def test_a_layer_takes_nine_launches(rows: list[dict[str, object]]) -> None:
    *single, layer = rows
    assert [(row["kernel"].split()[0], row["members"]) for row in single] == [  # type: ignore[attr-defined]
        ("add_norm_quantize", 1),
        ("linear_dynamic_outlier", 1),
        ("causal_conv1d_quantize", 2),
        ("linear_dynamic_outlier", 2),
        ("quantize_dynamic_outlier", 2),
        ("linear_dynamic_outlier", 2),
        ("selective_scan", 2),
        ("gate_sum_quantize", 1),
        ("linear_dynamic_outlier", 1),
    ]
    assert (layer["kind"], layer["launches"], layer["launches_alone"]) == ("layer", 9, 14)
    assert json.loads(json.dumps(rows)) == rows


def test_a_layer_is_the_sum_of_its_launches(rows: list[dict[str, object]]) -> None:
    *single, layer = rows
    for field in ("bytes", "int8", "fp32", "exponentials"):
        assert layer[field] == sum(row[field] for row in single)  # type: ignore[misc]
    for name in GPUS:
        total = sum(row["estimate_us"][name] for row in single)  # type: ignore[index]
        assert layer["estimate_us"][name] == pytest.approx(total, rel=1e-2)  # type: ignore[index]


def test_unknown_models_are_refused() -> None:
    with pytest.raises(UsageError, match="vmamba has no layers that are counted: choose of vim_"):
        launches(argparse.Namespace(models="vim_micro,vmamba", batches="1"))


def test_work_of_a_product() -> None:
    (launch,) = recorded(lambda: linear_case(192, 768, packed=True, outlier_bits=8))
    rows = BATCH * LENGTH
    read = rows * 192 + LENGTH * 2 + rows * 4 + BATCH * WINDOWS * 192 + 768 * 96 + 2 * 768 * 2
    assert work_of(launch).bytes == read + rows * 768 * 2
    assert work_of(launch).int8 == 2 * rows * 192 * 768
    both = work_of(join([launch, launch]))
    assert (both.bytes, both.int8) == (2 * work_of(launch).bytes, 2 * work_of(launch).int8)


def test_work_of_a_scan() -> None:
    (launch,) = recorded(lambda: scan_case(384, 16))
    work, tokens = work_of(launch), BATCH * LENGTH
    assert work.exponentials == tokens * 384 * 16
    assert work.bytes == 3 * tokens * 384 * 2 + 2 * tokens * 16 * 4 + 384 * 16 * 4 + 384 * 4
    assert work.cycles == work_of(join([launch, launch])).cycles == LENGTH * CYCLES_A_TOKEN_ALONE
    (idle,) = recorded(lambda: scan_case(384, 16, batch=1))
    assert work_of(idle).cycles == LENGTH * CYCLES_A_TOKEN


def test_work_of_a_scan_in_chunks() -> None:
    """28 tokens after each other instead of 3136, in each of two launches."""
    chunks, scan = recorded(lambda: scan_case(96, 1, length=3136, batch=1))
    found, busy = work_of(scan), recorded(lambda: scan_case(96, 1, length=3136))
    assert found.cycles == work_of(chunks).cycles == 28 * CYCLES_A_TOKEN
    gathered = 3136 // 28 * 96 * 2 * 4
    assert found.bytes == work_of(chunks).bytes + 3136 * (96 * 2 + 4) + 96 * 4
    assert found.bytes == 3136 * (96 * 6 + 8) + 2 * 96 * 4 + gathered
    assert [work_of(one).cycles for one in busy] == [3136 * CYCLES_A_TOKEN]


@pytest.mark.parametrize("name", list(GPUS))
def test_the_slowest_unit_decides(name: str) -> None:
    gpu = GPUS[name]
    assert gpu.fp32 == pytest.approx(
        {"H200": 67e12, "A100": 19.5e12, "L4": 30.3e12}[name], rel=0.01
    )
    for work, seconds in (
        (Work(bytes=10**9, int8=1), 1e9 / gpu.memory),
        (Work(bytes=1, int8=10**15), 1e15 / gpu.int8),
        (Work(fp32=10**12), 1e12 / gpu.fp32),
        (Work(exponentials=10**12), 1e12 / gpu.exponentials),
        (Work(cycles=1000), 1000 / gpu.clock),
    ):
        assert work.seconds(gpu) - BETWEEN_LAUNCHES == pytest.approx(seconds)
