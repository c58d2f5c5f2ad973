"""Suite "launches" on the smallest model; its estimates against counts made by hand."""

from __future__ import annotations

import argparse
import dataclasses
import json

import pytest

from benchmarks.launches import launches, measure
from benchmarks.offline import BATCH, LENGTH, WINDOWS, linear_case, recorded, scan_case
from benchmarks.roofline import BETWEEN_LAUNCHES, CYCLES_A_STEP, GPUS, Work, work_of
from ouro_compiler.errors import UsageError
from ouro_compiler.kernels.candidates import as_choice, current_choice
from ouro_compiler.kernels.grouping import join
from ouro_compiler.kernels.retile import retile


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
    nibbles = retile(launch, as_choice({**dict(current_choice(launch.spec)), "MATRIX_BITS": 4}))
    expected = dataclasses.replace(work_of(launch), int8=0, int4=work_of(launch).int8)
    assert work_of(nibbles) == expected
    both = work_of(join([launch, launch]))
    assert (both.bytes, both.int8) == (2 * work_of(launch).bytes, 2 * work_of(launch).int8)


def test_work_of_a_scan() -> None:
    (launch,) = recorded(lambda: scan_case(384, 16))
    work, tokens = work_of(launch), BATCH * LENGTH
    assert work.exponentials == tokens * 384 * 16
    assert work.bytes == 3 * tokens * 384 * 2 + 2 * tokens * 16 * 4 + 384 * 16 * 4 + 384 * 4
    assert work.steps == work_of(join([launch, launch])).steps == LENGTH


@pytest.mark.parametrize("name", list(GPUS))
def test_the_slowest_unit_decides(name: str) -> None:
    gpu = GPUS[name]
    assert gpu.fp32 == pytest.approx(
        {"H200": 67e12, "A100": 19.5e12, "L4": 30.3e12}[name], rel=0.01
    )
    for work, seconds in (
        (Work(bytes=10**9, int8=1), 1e9 / gpu.memory),
        (Work(bytes=1, int8=10**15), 1e15 / gpu.int8),
        (Work(bytes=1, int8=10**15, int4=10**15), 1e15 / gpu.int8 + 1e15 / gpu.int4),
        (Work(fp32=10**12), 1e12 / gpu.fp32),
        (Work(exponentials=10**12), 1e12 / gpu.exponentials),
        (Work(steps=1000), 1000 * CYCLES_A_STEP / gpu.clock),
    ):
        assert work.seconds(gpu) - BETWEEN_LAUNCHES == pytest.approx(seconds)
