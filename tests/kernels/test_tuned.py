"""Candidates, launches with them, and lookups: what needs neither a GPU nor the interpreter."""

from __future__ import annotations

import dataclasses
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.offline_cases import (
    conv_case,
    linear_case,
    other_direction,
    quantizer_cases,
    recorded,
    scan_case,
)
from ouro_compiler.kernels import linear
from ouro_compiler.kernels.candidates import (
    TUNED,
    as_choice,
    candidates,
    current_choice,
    free_values,
    is_candidate,
    known_values,
    offered_on,
)
from ouro_compiler.kernels.launch import Launch
from ouro_compiler.kernels.retile import outputs, retile
from ouro_compiler.kernels.spec import Template
from ouro_compiler.kernels.tuned import Choices, key_of, machine_of, tuned_launch
from ouro_compiler.kernels.tuning_table import Row, TuningWarning

BLOCKS = {"BLOCK_M": 32, "BLOCK_N": 128, "BLOCK_K": 32, "MATRIX_BITS": 8}
BLOCKS |= {"num_stages": 3, "num_warps": 4}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OURO_CACHE_DIR", str(tmp_path / "ouro"))
    return tmp_path / "ouro" / "tuning"


def row(digest: str, bucket: int, **changes: Any) -> Row:
    choice = as_choice(BLOCKS)
    plain = Row(
        template=Template.LINEAR,
        digest=digest,
        bucket=bucket,
        kernel="linear_dynamic_outlier int4 o8",
        shape="6304 x 192 -> 768",
        choice=choice,
        ratio=0.9,
        default_us=12.5,
        tried=(choice,),
    )
    return dataclasses.replace(plain, **changes)


def product(outlier_bits: int = 8, outputs: int = 768) -> Launch:
    return recorded(lambda: linear_case(192, outputs, packed=True, outlier_bits=outlier_bits))[0]


def test_keys() -> None:
    """Directions share one; dtypes, epilogues, shapes and about twice the rows do not."""
    one = product()
    key = key_of(one.spec, one.args)
    back = other_direction(one)
    assert key_of(back.spec, back.args) == key
    assert key[1] == 8192  # 32 * 197 rows
    options = {"packed": True, "outlier_bits": 8}
    others = [
        recorded(lambda: linear_case(192, 768, dtype=torch.float32, **options))[0],  # type: ignore[arg-type]
        recorded(lambda: linear_case(192, 768, activation="silu", **options))[0],  # type: ignore[arg-type]
        product(outputs=384),
        product(outlier_bits=16),
    ]
    assert len({key, *(key_of(other.spec, other.args) for other in others)}) == 5
    fewer = (one.args[0][:16], *one.args[1:])
    assert key_of(one.spec, fewer) == (key[0], 4096)


def test_lookups() -> None:
    one = product()
    digest, bucket = key_of(one.spec, one.args)
    choices = Choices({(digest, bucket): row(digest, bucket)})
    for launch in (one, other_direction(one)):
        assert choices.of(launch.spec, launch.args) == as_choice(BLOCKS)
    assert choices.of(one.spec, (one.args[0][:16], *one.args[1:])) is None
    assert choices.of(product(outputs=384).spec, one.args) is None
    default = row(digest, bucket, choice=None)
    assert Choices({default.key: default}).of(one.spec, one.args) is None


def test_a_choice_that_is_no_candidate_of_the_kernel_is_refused_once() -> None:
    """A valid table can still name what would change bits: rows of a tile of fp16 outliers."""
    one = product(outlier_bits=16)
    digest, bucket = key_of(one.spec, one.args)
    choices = Choices({(digest, bucket): row(digest, bucket)})
    with pytest.warns(TuningWarning, match="none of its candidates: it runs with its default"):
        assert choices.of(one.spec, one.args) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choices.of(one.spec, one.args) is None


def test_without_a_gpu_nothing_is_looked_up(place: Path) -> None:
    assert machine_of(torch.device("cpu")) is None
    one = product()
    assert tuned_launch(one.spec, one.grid, one.args) is None
    assert not place.exists()


def test_what_is_free() -> None:
    assert {"BLOCK_M", "num_warps"} <= free_values(product().spec).keys()
    assert free_values(product(16).spec).keys() == {"BLOCK_K", "num_stages"}
    launches = [*recorded(lambda: quantizer_cases(384)), *recorded(lambda: scan_case(64, 16))]
    launches += recorded(lambda: conv_case(384))
    free = {one.spec.template: set(free_values(one.spec)) for one in launches}
    known = {
        Template.QUANTIZE: {"num_warps"},
        Template.DEQUANTIZE: {"BLOCK_M", "BLOCK_K", "num_warps"},
        Template.ADD_NORM_QUANTIZE: set(),  # warps would change the order of the norm's sum
        Template.CONV_QUANTIZE: {"num_warps"},
        Template.GATE_SUM_QUANTIZE: {"num_warps"},
        Template.SCAN: set(),
        Template.CONV: {"BLOCK_L", "BLOCK_D", "num_warps"},
    }
    assert known.items() <= free.items()
    assert {one for one, names in free.items() if names} | {Template.LINEAR} == TUNED


@pytest.mark.parametrize(
    ("inputs", "outputs"), [(192, 768), (384, 44), (12, 384), (384, 192), (768, 3072), (5, 7)]
)
@pytest.mark.parametrize("outlier_bits", [8, 16])
def test_candidates_of_products(inputs: int, outputs: int, outlier_bits: int) -> None:
    one = recorded(lambda: linear_case(inputs, outputs, packed=True, outlier_bits=outlier_bits))[0]
    default = current_choice(one.spec)
    for best in (default, as_choice({**dict(default), "BLOCK_K": 32})):
        found = candidates(one.spec, best, 6304)
        assert default not in found
        assert len(set(found)) == len(found) <= 50
        assert all(is_candidate(one.spec, choice) for choice in found)
    few = candidates(one.spec, default, 5)
    assert all(dict(choice).get("BLOCK_M", 16) == 16 or choice[1] == default[1] for choice in few)
    assert not is_candidate(one.spec, as_choice({**dict(default), "BLOCK_M": 256}))
    assert not is_candidate(one.spec, as_choice({**dict(default), "BLOCK_O": 16}))
    assert not is_candidate(one.spec, default[1:])


def test_the_nearest_candidates_come_first() -> None:
    spec = product().spec
    found = candidates(spec, current_choice(spec), 6304)
    default = dict(current_choice(spec))
    later = ("BLOCK_K", "num_stages", "MATRIX_BITS")
    steps = [
        sum(abs(math.log2(value / default[name])) for name, value in choice)
        for choice in found
        if all(dict(choice)[name] == default[name] for name in later)
    ]
    assert steps == sorted(steps)
    assert steps[0] == 1


def test_int4_tensor_cores_are_offered_where_they_are() -> None:
    """To products of nibbles alone, and to GPUs between sm_80 and sm_89; never by default."""
    spec = product().spec
    assert dict(current_choice(spec))["MATRIX_BITS"] == 8
    found = [
        one for one in candidates(spec, current_choice(spec), 6304) if ("MATRIX_BITS", 4) in one
    ]
    assert len(found) >= 4
    for machine in ("NVIDIA A100-SXM4-80GB sm_80", "Orin sm_87", "NVIDIA L4 sm_89", "interpreter"):
        assert all(offered_on(machine, one) for one in found)
    for other in ("NVIDIA H200 sm_90", "Tesla T4 sm_75", "NVIDIA B200 sm_100", "sm_800", "", None):
        assert not any(offered_on(other, one) for one in found)
        assert offered_on(other, current_choice(spec))
    for case in ((192, False, 8), (192, True, 16), (48, True, 8)):
        inputs, packed, bits = case
        (one,) = recorded(
            lambda: linear_case(inputs, 768, packed=packed, outlier_bits=bits)  # noqa: B023
        )
        assert "MATRIX_BITS" not in free_values(one.spec), case


def test_what_nobody_knows_has_no_candidates() -> None:
    spec = recorded(lambda: scan_case(64, 4))[0].spec
    assert candidates(spec, (), 100) == []
    assert known_values(Template.SCAN) == {}


@pytest.mark.parametrize("outlier_bits", [8, 16])
def test_a_retiled_product_is_what_the_host_makes_of_its_blocks(
    outlier_bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = product(outlier_bits)
    for choice in candidates(one.spec, current_choice(one.spec), 6304):
        values = {**dict(one.spec.constants), **dict(choice)}
        blocks = {name: values[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K")}
        with monkeypatch.context() as patch:
            patch.setattr(linear, "linear_blocks", lambda *_, blocks=blocks, **__: blocks)
            host = product(outlier_bits)
        found = retile(one, choice)
        assert found.grid == host.grid
        expected = {**dict(host.spec.constants), "MATRIX_BITS": values["MATRIX_BITS"]}
        assert dict(found.spec.constants) == expected
        shapes = [[getattr(arg, "shape", arg) for arg in each.args] for each in (found, host)]
        assert shapes[0] == shapes[1]
        assert (found.spec.num_stages, found.spec.num_warps) == (
            values["num_stages"],
            dict(choice).get("num_warps", one.spec.num_warps),
        )


def test_every_other_launch_is_retiled() -> None:
    launches = [*recorded(lambda: quantizer_cases(384)), *recorded(lambda: conv_case(384))]
    for one in launches:
        assert retile(one, current_choice(one.spec)) == one
        for choice in candidates(one.spec, current_choice(one.spec), 6304):
            found = retile(one, choice)
            assert current_choice(found.spec) == choice
            assert found.args == one.args
            if one.spec.template in (Template.DEQUANTIZE, Template.CONV):
                covered = [
                    length * dict(found.spec.constants).get(name, 1)
                    for length, name in zip(found.grid, _tiles(found), strict=True)
                ]
                assert all(a >= b for a, b in zip(covered, _extent(found), strict=True))
            else:
                assert found.grid == one.grid


def _tiles(launch: Launch) -> tuple[str, str, str]:
    if launch.spec.template is Template.CONV:
        return ("", "BLOCK_L", "BLOCK_D")
    return ("BLOCK_M", "BLOCK_K", "")


def _extent(launch: Launch) -> tuple[int, int, int]:
    constants = dict(launch.spec.constants)
    if launch.spec.template is Template.CONV:
        return (32, constants["LENGTH"], constants["CHANNELS"])
    return (32 * constants["LENGTH"], constants["COLUMNS"], 1)


def test_scratch_is_no_output() -> None:
    """The list of columns is as long as its tiles want it, and room is left unwritten."""
    assert [tuple(one.shape) for one in outputs(product())] == [(32, 197, 768)]
    (quantizer, *_) = recorded(lambda: quantizer_cases(384))
    assert len(outputs(quantizer)) == 3
