"""Tables of tuned kernels on disk: JSON, a file a GPU and Triton version, in the private cache.

A table is data: what does not follow the schema, or names blocks that are no candidates, is refused
as a whole, with one warning, and defaults are used. Writers merge their rows under a lock.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ouro_compiler.kernels.cache import cache_directory
from ouro_compiler.kernels.candidates import TUNED, Choice, as_choice, known_values, offered_on
from ouro_compiler.kernels.spec import Template

FORMAT = 1
_INVALID = (OSError, ValueError, RecursionError)  # of a file that is no table
Key = tuple[str, int]  # digest of a kernel by default with its operands' dtypes; B * L, rounded up


class TuningWarning(UserWarning):
    """A table of tuned kernels, or a row of it, is not used, for the reason given."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What is known of one kernel at about one number of rows.

    choice: what is used instead of the default, None if that is as fast. ratio: its time over the
    default's, 1.0 without a choice. default_us: microseconds a launch, of its group where it is in
    one. tried: all that was compared, the default left out; refused: those of them that were not
    timed, and why.
    """

    template: Template
    digest: str
    bucket: int
    kernel: str
    shape: str
    choice: Choice | None
    ratio: float
    default_us: float
    tried: tuple[Choice, ...]
    refused: tuple[tuple[Choice, str], ...] = ()

    @property
    def key(self) -> Key:
        """What it is looked up by."""
        return self.digest, self.bucket


def triton_version() -> str:
    """The version of Triton that compiles kernels here."""
    import triton

    return str(triton.__version__)


def table_path(machine: str) -> Path:
    """The file of a machine and this Triton. Raises CacheError without a private directory."""
    name = re.sub(r"[^a-z0-9.]+", "_", f"{machine} triton {triton_version()}".lower())
    return cache_directory("tuning") / f"{name}.json"


def read_table(machine: str) -> dict[Key, Row]:
    """The rows of a machine by key; none, with a TuningWarning, of a table that is not valid."""
    path = table_path(machine)
    try:
        return _read(path, machine)
    except _INVALID as error:
        warnings.warn(
            f"tuned kernels in {path.name} are not used, defaults are: {error}; "
            "delete it or tune again",
            TuningWarning,
            stacklevel=2,
        )
        return {}


def keep_rows(machine: str, rows: Iterable[Row]) -> None:
    """Add rows to a machine's table, through a temporary name; one that is not valid is replaced.

    Of a key's rows the one with more tried stays.
    """
    path = table_path(machine)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            merged = _read(path, machine)
        except _INVALID:
            merged = {}
        for row in rows:
            old = merged.get(row.key)
            if old is None or len(old.tried) <= len(row.tried):
                merged[row.key] = row
        _write(path, format_table(machine, merged.values()))


def _read(path: Path, machine: str) -> dict[Key, Row]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    return {row.key: row for row in parse_table(text, machine)}


def format_table(machine: str, rows: Iterable[Row]) -> str:
    """A table as JSON, rows in the order of their keys."""
    content = {
        "format": FORMAT,
        "gpu": machine,
        "triton": triton_version(),
        "rows": [_row_data(row) for row in sorted(rows, key=lambda row: row.key)],
    }
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def parse_table(text: str, machine: str) -> list[Row]:
    """The rows of a table. Raises ValueError, which says what is wrong first."""
    content = _record(json.loads(text), "the table", ("format", "gpu", "triton", "rows"))
    for name, expected in (("format", FORMAT), ("gpu", machine), ("triton", triton_version())):
        if content[name] != expected or type(content[name]) is not type(expected):
            raise ValueError(f"{name} is {content[name]!r}, not {expected!r}")
    return [_parse_row(one, machine) for one in _list(content["rows"], "rows")]


def _row_data(row: Row) -> dict[str, Any]:
    return {
        "template": row.template.value,
        "digest": row.digest,
        "bucket": row.bucket,
        "kernel": row.kernel,
        "shape": row.shape,
        "choice": None if row.choice is None else dict(row.choice),
        "ratio": row.ratio,
        "default_us": row.default_us,
        "tried": [dict(one) for one in row.tried],
        "refused": [{"choice": dict(one), "reason": reason} for one, reason in row.refused],
    }


def _parse_row(data: Any, machine: str) -> Row:
    names = ("template", "digest", "bucket", "kernel", "shape", "choice", "ratio", "default_us")
    found = _record(data, "a row", (*names, "tried", "refused"))
    template = next((one for one in TUNED if one.value == found["template"]), None)
    if template is None:
        raise ValueError(f"template {found['template']!r} is not tuned")
    if not re.fullmatch(r"[0-9a-f]{64}", _typed(found, "digest", str)):
        raise ValueError(f"digest {found['digest']!r} is none")
    bucket = _typed(found, "bucket", int)
    if bucket < 1 or bucket & (bucket - 1):
        raise ValueError(f"bucket {bucket} is no power of two")
    for name in ("ratio", "default_us"):
        if not 0 <= _typed(found, name, float) < float("inf"):
            raise ValueError(f"{name} {found[name]} is no number of 0 or more")

    def choice(given: Any) -> Choice:
        return _choice(template, machine, given)

    refused = []
    for one in _list(found["refused"], "refused"):
        entry = _record(one, "a refused candidate", ("choice", "reason"))
        refused.append((choice(entry["choice"]), _typed(entry, "reason", str)))
    return Row(
        template=template,
        digest=found["digest"],
        bucket=bucket,
        kernel=_typed(found, "kernel", str),
        shape=_typed(found, "shape", str),
        choice=None if found["choice"] is None else choice(found["choice"]),
        ratio=found["ratio"],
        default_us=found["default_us"],
        tried=tuple(choice(one) for one in _list(found["tried"], "tried")),
        refused=tuple(refused),
    )


def _choice(template: Template, machine: str, data: Any) -> Choice:
    if type(data) is not dict or not data:
        raise ValueError(f"{data!r} is no choice of blocks")
    known = known_values(template)
    for name, value in data.items():
        if name not in known or type(value) is not int or value not in known[name]:
            raise ValueError(f"{name} = {value!r} is no candidate of {template.value}")
    choice = as_choice(data)
    if not offered_on(machine, choice):
        raise ValueError(f"{data!r} is no candidate of {template.value} on {machine}")
    return choice


def _record(data: Any, what: str, names: tuple[str, ...]) -> Mapping[str, Any]:
    if type(data) is not dict:
        raise ValueError(f"{what} is no object")
    if data.keys() != set(names):
        odd = sorted(map(str, data.keys() ^ set(names)))
        raise ValueError(f"{what} has other keys than it should: {', '.join(odd)}")
    return data


def _typed(data: Mapping[str, Any], name: str, kind: type) -> Any:
    if type(data[name]) is not kind:
        raise ValueError(f"{name} is {data[name]!r}, not of type {kind.__name__}")
    return data[name]


def _list(data: Any, name: str) -> list[Any]:
    if type(data) is not list:
        raise ValueError(f"{name} is no list")
    return data


def _write(path: Path, text: str) -> None:
    descriptor, partial = tempfile.mkstemp(dir=path.parent, suffix=".partial")  # mode 0600
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
