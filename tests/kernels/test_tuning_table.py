"""Tables of tuned kernels on disk: what was written is read, what is not valid is refused."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ouro_compiler.errors import CacheError
from ouro_compiler.kernels.candidates import TUNED, as_choice, known_values
from ouro_compiler.kernels.spec import Template
from ouro_compiler.kernels.tuning_table import (
    Row,
    TuningWarning,
    keep_rows,
    read_table,
    table_path,
)

MACHINE = "NVIDIA H200 sm_90"
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
    "INT4 tensor cores where there are none": (
        _set("rows", 0, "tried", 0, "MATRIX_BITS", value=4),
        "is no candidate of linear_dynamic_outlier on NVIDIA H200 sm_90",
    ),
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
