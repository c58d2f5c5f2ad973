"""Suite "launches" on the smallest model; its estimates against counts made by hand."""

from __future__ import annotations

import argparse
import dataclasses
import json

import pytest

from benchmarks.launches import launches, measure, shortened
from benchmarks.launches_table import tables
from benchmarks.offline_cases import BATCH, LENGTH, WINDOWS, linear_case, recorded, scan_case
from benchmarks.roofline import (
    BETWEEN_LAUNCHES,
    CYCLES_A_TOKEN,
    CYCLES_A_TOKEN_ALONE,
    GPUS,
    Work,
    work_of,
)
from ouro_compiler.errors import UsageError
from ouro_compiler.kernels.candidates import as_choice, current_choice
from ouro_compiler.kernels.grouping import join
from ouro_compiler.kernels.retile import retile


@pytest.fixture(scope="module")
def rows() -> list[dict[str, object]]:
    (found,) = measure("vim_micro", "none", [2])
    return found


def test_a_layer_takes_eight_launches(rows: list[dict[str, object]]) -> None:
    *single, layer, model = rows
    assert [(row["kernel"].split()[0], row["members"]) for row in single] == [  # type: ignore[attr-defined]
        ("add_norm_quantize", 1),
        ("linear_dynamic_outlier", 1),
        ("causal_conv1d_quantize", 2),
        ("linear_dynamic_outlier", 2),
        ("quantizing_linear", 2),
        ("selective_scan", 2),
        ("gate_sum_quantize", 1),
        ("linear_dynamic_outlier", 1),
    ]
    assert (layer["kind"], layer["launches"], layer["launches_alone"]) == ("layer", 8, 14)
    assert layer["calls"] == []
    assert (model["kind"], model["launches"], model["calls"]) == ("model", 8 * layer["layers"], 0)
    assert json.loads(json.dumps(rows)) == rows


def test_a_layer_is_the_sum_of_its_launches(rows: list[dict[str, object]]) -> None:
    *single, layer, _ = rows
    for field in ("bytes", "int8", "fp32", "exponentials"):
        assert layer[field] == sum(row[field] for row in single)  # type: ignore[misc]
    for name in GPUS:
        total = sum(row["estimate_us"][name] for row in single)  # type: ignore[index]
        assert layer["estimate_us"][name] == pytest.approx(total, rel=1e-2)  # type: ignore[index]


def test_unknown_models_are_refused() -> None:
    with pytest.raises(UsageError, match="vmamba has no blocks that are counted: choose of vim_"):
        launches(argparse.Namespace(models="vim_micro,vmamba", batches="1"))


def test_blocks_of_a_vmamba() -> None:
    """One block a stage, with what has no kernel named, scaled by depth."""
    (found,) = measure("vmamba_micro", "none", [2])
    blocks = [row for row in found if row["kind"] == "layer"]
    model = found[-1]
    assert [(row["block"], row["layers"]) for row in blocks] == [("stage 0", 2), ("stage 1", 2)]
    for row in blocks:
        single = [one for one in found if one["kind"] == "launch" and one["block"] == row["block"]]
        kernels = [one["kernel"].split()[0] for one in single]
        assert len(kernels) == row["launches"] < row["launches_alone"]
        assert kernels.count("cross_merge_norm_quantize") == 1
        assert next(one for one in single if "selective" in one["kernel"])["members"] == 4
        assert kernels[0] == "add_norm_quantize"
        assert kernels[-1] == "linear_dynamic_outlier"
        assert row["calls"] == []
    assert model["launches"] == 2 * sum(row["launches"] for row in blocks)
    assert model["calls"] == 2 * sum(len(row["calls"]) for row in blocks)
    assert "aten.linear.default" in model["calls_of_the_model"]  # the head
    for name in GPUS:
        total = 2 * sum(row["estimate_us"][name] for row in blocks)
        assert model["estimate_us"][name] == pytest.approx(total)


def test_kinds_of_blocks() -> None:
    for name, expected in (
        ("vim_tiny", [("layer", 24)]),
        ("vmamba_tiny_s1l8", [(f"stage {s}", count) for s, count in enumerate((2, 2, 8, 2))]),
        (
            "mambavision_tiny",
            [
                *(("stage 2, scan", 4), ("stage 2, attention", 4)),
                *(("stage 3, scan", 2), ("stage 3, attention", 2)),
            ],
        ),
    ):
        assert [(part.name, part.count) for part in shortened(name)[1]] == expected


def test_tables(rows: list[dict[str, object]]) -> None:
    counts, estimates, models = tables(rows).split("\n\n")
    layer = next(row for row in rows if row["kind"] == "layer")
    assert (
        counts.splitlines()[2] == f"| vim_micro, layer | none | {layer['layers']} | 8 | 14 | none |"
    )
    assert f"| vim_micro, layer | none | 2 | {layer['bytes'] / 1e6:.1f} |" in estimates  # type: ignore[operator]
    assert models.splitlines()[2].startswith(
        f"| vim_micro | none | 2 | {8 * layer['layers']} | 0 |"
    )  # type: ignore[operator]


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
        (Work(bytes=1, int8=10**15, int4=10**15), 1e15 / gpu.int8 + 1e15 / gpu.int4),
        (Work(fp32=10**12), 1e12 / gpu.fp32),
        (Work(exponentials=10**12), 1e12 / gpu.exponentials),
        (Work(cycles=1000), 1000 / gpu.clock),
    ):
        assert work.seconds(gpu) - BETWEEN_LAUNCHES == pytest.approx(seconds)
