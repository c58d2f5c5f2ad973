"""What tuning found, in memory: which choice a launch runs with, if there is one for its device.

A key is the digest of a kernel as it is by default, whatever its direction (so that launches that
could be one agree) with the dtypes of its operands, and B * L rounded up to a power of two. Since
no choice changes a bit, it may depend on the batch.
"""

from __future__ import annotations

import contextvars
import dataclasses
import functools
import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from ouro_compiler.kernels.blocks import next_power_of_2
from ouro_compiler.kernels.candidates import TUNED, Choice, is_candidate
from ouro_compiler.kernels.launch import Launch, interpreting
from ouro_compiler.kernels.retile import retile
from ouro_compiler.kernels.spec import KernelSpec
from ouro_compiler.kernels.tuning_table import Key, Row, TuningWarning, read_table

Dtypes = tuple[torch.dtype | None, ...]

_DEFAULTS: contextvars.ContextVar[bool] = contextvars.ContextVar("ouro_defaults", default=False)


@contextmanager
def defaults_only() -> Iterator[None]:
    """Inside, launches are what shapes alone give, whatever was tuned."""
    token = _DEFAULTS.set(True)
    try:
        yield
    finally:
        _DEFAULTS.reset(token)


def forget() -> None:
    """Read tables again when they are next asked for: one was written."""
    _choices_on.cache_clear()


@functools.cache
def machine_of(device: torch.device) -> str | None:
    """What tables call a device: a GPU's name and capability. None where nothing is tuned."""
    if device.type == "cuda" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name} sm_{properties.major}{properties.minor}"
    return "interpreter" if device.type == "cpu" and interpreting() else None


def key_of(spec: KernelSpec, args: tuple[Any, ...]) -> Key:
    """The key of a single launch by default."""
    return _digest(spec, _dtypes(args)), _bucket(spec, args)


def tuned_launch(
    spec: KernelSpec, grid: tuple[int, int, int], args: tuple[Any, ...]
) -> Launch | None:
    """What to launch instead of a single launch by default; None if just that."""
    if spec.template not in TUNED or _DEFAULTS.get():
        return None
    choices = _choices_on(args[0].device)
    choice = choices.of(spec, args) if choices.rows else None
    return None if choice is None else retile(Launch(spec=spec, grid=grid, args=args), choice)


class Choices:
    """The rows of one table, looked up by launch; what was asked once is remembered."""

    def __init__(self, rows: Mapping[Key, Row]) -> None:
        self.rows = rows
        self._found: dict[Any, Choice | None] = {}

    def of(self, spec: KernelSpec, args: tuple[Any, ...]) -> Choice | None:
        """The choice for a single launch by default; None without one."""
        dtypes, bucket = _dtypes(args), _bucket(spec, args)
        key = (spec, dtypes, bucket)
        try:
            return self._found[key]
        except KeyError:
            return self._found.setdefault(key, self._choice(spec, dtypes, bucket))

    def _choice(self, spec: KernelSpec, dtypes: Dtypes, bucket: int) -> Choice | None:
        row = self.rows.get((_digest(spec, dtypes), bucket))
        if row is None or row.choice is None:
            return None
        if is_candidate(spec, row.choice):
            return row.choice
        warnings.warn(
            f"the table of tuned kernels has {dict(row.choice)} for {spec.label}, which is none of "
            "its candidates: it runs with its default; tune again",
            TuningWarning,
            stacklevel=4,
        )
        return None


@functools.cache
def _choices_on(device: torch.device) -> Choices:
    machine = machine_of(device)
    return Choices({} if machine is None else read_table(machine))


def _dtypes(args: tuple[Any, ...]) -> Dtypes:
    return tuple([getattr(arg, "dtype", None) for arg in args])


def _bucket(spec: KernelSpec, args: tuple[Any, ...]) -> int:
    """B * L, rounded up to a power of two; the first operand's first dimension is the batch."""
    return next_power_of_2(max(1, int(args[0].shape[0]) * spec["LENGTH"]))


def _digest(spec: KernelSpec, dtypes: Dtypes) -> str:
    forward = {**dict(spec.constants), "REVERSE": 0}
    plain = dataclasses.replace(spec, constants=tuple(sorted(forward.items())))
    return hashlib.sha256(json.dumps([plain.digest, *map(str, dtypes)]).encode()).hexdigest()
