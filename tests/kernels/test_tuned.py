"""Tables of tuned kernels, candidates and lookups: what needs neither a GPU nor the interpreter."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import stat
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.offline import (
    conv_case,
    linear_case,
    other_direction,
    quantizer_cases,
    recorded,
    scan_case,
)
from ouro_compiler.errors import CacheError
from ouro_compiler.kernels import linear
from ouro_compiler.kernels.candidates import (
    TUNED,
    as_choice,
    candidates,
    current_choice,
    free_values,
    is_candidate,
    known_values,
)
from ouro_compiler.kernels.launch import Launch
from ouro_compiler.kernels.retile import outputs, retile
from ouro_compiler.kernels.spec import Template
from ouro_compiler.kernels.tuned import Choices, key_of, machine_of, tuned_launch
from ouro_compiler.kernels.tuning_table import (
    Row,
    TuningWarning,
    keep_rows,
    read_table,
    table_path,
)

MACHINE = "NVIDIA H200 sm_90"
WARPS = {"num_warps": 2}
BLOCKS = {"BLOCK_M": 32, "BLOCK_N": 128, "BLOCK_K": 32, "num_stages": 3, "num_warps": 4}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OURO_CACHE_DIR", str(tmp_path / "ouro"))
    return tmp_path / "ouro" / "tuning"


def row(number: int = 0, **changes: Any) -> Row:
    plain = Row(
        template=Template.LINEAR,
        digest=f"{number:064x}",
        bucket=256,
        kernel="linear_dynamic_outlier int4 o8",
        shape="197 x 192 -> 768",
        choice=as_choice(BLOCKS),
        ratio=0.9,
        default_us=12.5,
        tried=(as_choice(BLOCKS), as_choice({**BLOCKS, "BLOCK_M": 16})),
        refused=((as_choice({**BLOCKS, "BLOCK_M": 16}), "spills registers"),),
    )
    return dataclasses.replace(plain, **changes)


def product(outlier_bits: int = 8, outputs: int = 768) -> Launch:
    return recorded(lambda: linear_case(192, outputs, packed=True, outlier_bits=outlier_bits))[0]


def test_round_trip(place: Path) -> None:
    rows = [row(1), row(2, choice=None, ratio=1.0, refused=()), row(1, bucket=8192)]
    keep_rows(MACHINE, rows)
    assert read_table(MACHINE) == {one.key: one for one in rows}
    path = table_path(MACHINE)
    assert path.parent == place
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert {one.suffix for one in place.iterdir()} == {".json", ".lock"}, "a partial file is left"
    assert read_table("NVIDIA L4 sm_89") == {}


def test_of_two_rows_the_one_with_more_tried_stays() -> None:
    more = row(1, tried=(*row().tried, as_choice({**BLOCKS, "BLOCK_M": 64})))
    keep_rows(MACHINE, [more, row(2)])
    keep_rows(MACHINE, [row(1, ratio=0.5), row(2, ratio=0.5)])
    found = read_table(MACHINE)
    assert found[more.key] == more
    assert found[row(2).key].ratio == 0.5


def test_writers_at_the_same_time_lose_nothing() -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: keep_rows(MACHINE, [row(number)]), range(40)))
    assert len(read_table(MACHINE)) == 40


def _set(*path: Any, value: Any) -> Callable[[Any], Any]:
    def change(table: Any) -> Any:
        inner = table
        for one in path[:-1]:
            inner = inner[one]
        inner[path[-1]] = value
        return table

    return change


def _drop(*path: Any) -> Callable[[Any], Any]:
    def change(table: Any) -> Any:
        inner = table
        for one in path[:-1]:
            inner = inner[one]
        del inner[path[-1]]
        return table

    return change


POISON: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a key of ours missing": (_drop("rows", 0, "ratio"), "other keys than it should: ratio"),
    "an unknown key": (_set("rows", 0, "run", value="rm"), "other keys than it should: run"),
    "an unknown key outside": (_set("code", value=1), "other keys than it should: code"),
    "another format": (_set("format", value=2), "format is 2, not 1"),
    "a format that equals": (_set("format", value=True), "format is True"),
    "another GPU": (_set("gpu", value="NVIDIA L4 sm_89"), "gpu is 'NVIDIA L4 sm_89'"),
    "another triton": (_set("triton", value="0.0"), "triton is '0.0'"),
    "rows no list": (_set("rows", value={}), "rows is no list"),
    "a row no object": (_set("rows", 0, value=3), "a row is no object"),
    "a kernel not tuned": (_set("rows", 0, "template", value="selective_scan"), "is not tuned"),
    "a template no word": (_set("rows", 0, "template", value=["x"]), "is not tuned"),
    "no digest": (_set("rows", 0, "digest", value="../x"), "digest '../x' is none"),
    "no bucket": (_set("rows", 0, "bucket", value=100), "bucket 100 is no power of two"),
    "a bucket that is true": (_set("rows", 0, "bucket", value=True), "bucket is True"),
    "a ratio that is no number": (
        _set("rows", 0, "ratio", value=math.nan),
        "no number of 0 or more",
    ),
    "a ratio in words": (_set("rows", 0, "ratio", value="0.9"), "ratio is '0.9'"),
    "a block never tried": (_set("rows", 0, "choice", "BLOCK_M", value=48), "BLOCK_M = 48 is no"),
    "a huge block": (_set("rows", 0, "choice", "BLOCK_N", value=1 << 70), "BLOCK_N = "),
    "a block that is no int": (_set("rows", 0, "choice", "BLOCK_M", value=32.0), "= 32.0 is no"),
    "a constant that is not free": (_set("rows", 0, "choice", "PACKED", value=0), "PACKED = 0 is"),
    "an empty choice": (_set("rows", 0, "choice", value={}), "{} is no choice"),
    "tried in words": (_set("rows", 0, "tried", value="all"), "tried is no list"),
    "a reason missing": (_drop("rows", 0, "refused", 0, "reason"), "other keys"),
}


@pytest.mark.parametrize("name", list(POISON))
def test_poisoned_tables_are_refused_with_one_warning(name: str) -> None:
    change, words = POISON[name]
    keep_rows(MACHINE, [row(1), row(2)])
    path = table_path(MACHINE)
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.warns(TuningWarning) as said:
        assert read_table(MACHINE) == {}
    (text,) = (str(one.message) for one in said)
    assert words in text
    assert "defaults are" in text
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"9" * 5000])
def test_what_is_no_json_is_refused_and_written_anew(content: bytes) -> None:
    path = table_path(MACHINE)
    path.write_bytes(content)
    with pytest.warns(TuningWarning, match="are not used"):
        assert read_table(MACHINE) == {}
    keep_rows(MACHINE, [row(1)])
    assert list(read_table(MACHINE)) == [row(1).key]


def test_a_place_that_cannot_be_used(place: Path) -> None:
    table_path(MACHINE).mkdir()
    with pytest.warns(TuningWarning, match="directory"):
        assert read_table(MACHINE) == {}
    place.chmod(0o777)
    with pytest.raises(CacheError, match="can be written by others"):
        read_table(MACHINE)


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
    choices = Choices({(digest, bucket): row(digest=digest, bucket=bucket)})
    for launch in (one, other_direction(one)):
        assert choices.of(launch.spec, launch.args) == as_choice(BLOCKS)
    assert choices.of(one.spec, (one.args[0][:16], *one.args[1:])) is None
    assert choices.of(product(outputs=384).spec, one.args) is None
    default = row(digest=digest, bucket=bucket, choice=None)
    assert Choices({default.key: default}).of(one.spec, one.args) is None


def test_a_choice_that_is_no_candidate_of_the_kernel_is_refused_once() -> None:
    """A valid table can still name what would change bits: rows of a tile of fp16 outliers."""
    one = product(outlier_bits=16)
    digest, bucket = key_of(one.spec, one.args)
    choices = Choices({(digest, bucket): row(digest=digest, bucket=bucket)})
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
    steps = [
        sum(abs(math.log2(value / default[name])) for name, value in choice)
        for choice in found
        if dict(choice)["BLOCK_K"] == default["BLOCK_K"] and dict(choice)["num_stages"] == 3
    ]
    assert steps == sorted(steps)
    assert steps[0] == 1


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
        assert found.spec.constants == host.spec.constants
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


def test_rows_of_every_template_go_through_a_table() -> None:
    rows = [
        row(number, template=template, choice=as_choice(dict(values)), tried=(), refused=())
        for number, (template, values) in enumerate(
            (template, zip(known_values(template), first, strict=True))
            for template in sorted(TUNED)
            for first in itertools.islice(itertools.product(*known_values(template).values()), 3)
        )
    ]
    keep_rows(MACHINE, rows)
    assert read_table(MACHINE) == {one.key: one for one in rows}
