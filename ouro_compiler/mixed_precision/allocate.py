"""Which layers get how many bits: the most noise removed per byte, as a path of single steps.

A unit is a layer, or the layers that share a quantizer; its options differ in bytes and in the
noise that they alone put on the logits. Noise of several units is taken to add up. From the
cheapest options on, the path takes the step that removes most noise a byte, along each unit's lower
convex hull, so that every part of it is the best for its own size, up to one step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Option:
    """Bits of a unit, the bytes of its weights' codes and the noise power on the logits."""

    weights: int
    activations: int
    bytes: int
    noise: float


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Layers that get the same bits, and what they may get; the first option is the start."""

    layers: tuple[str, ...]
    options: tuple[Option, ...]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One unit goes to another option, which adds these bytes (never less than 0)."""

    unit: int
    option: int
    bytes: int


def smallest(units: Sequence[Unit]) -> list[int]:
    """Each unit's start: the first option with the fewest bytes."""
    return [min(range(len(one.options)), key=lambda i: one.options[i].bytes) for one in units]


def upgrade_path(units: Sequence[Unit], spare: float) -> list[Step]:
    """Steps in the order they are taken, adding at most `spare` bytes in all.

    A step that does not fit is left out, with those of its unit that build on it; smaller ones of
    other units still follow. Ties go to the unit that comes first.
    """
    steps: list[tuple[float, Step]] = []
    for index, unit in enumerate(units):
        at = smallest([unit])[0]
        while (upgrade := _best_upgrade(unit, at)) is not None:
            gain, option = upgrade
            added = unit.options[option].bytes - unit.options[at].bytes
            steps.append((gain, Step(unit=index, option=option, bytes=added)))
            at = option
    steps.sort(key=lambda one: -one[0])  # stable: a unit's own gains fall
    path: list[Step] = []
    closed: set[int] = set()
    for _, step in steps:
        if step.unit in closed:
            continue
        if step.bytes > spare:
            closed.add(step.unit)
            continue
        spare -= step.bytes
        path.append(step)
    return path


def _best_upgrade(unit: Unit, at: int) -> tuple[float, int] | None:
    """(noise removed a byte, option) of the steepest step from an option; None if none helps."""
    here, best = unit.options[at], None
    for index, option in enumerate(unit.options):
        removed, added = here.noise - option.noise, option.bytes - here.bytes
        if removed <= 0 or added < 0:
            continue
        gain = removed / added if added else float("inf")
        # Of equal gains the one that removes most: free steps go all the way at once.
        key = (gain, removed)
        if best is None or key > best[0]:
            best = (key, index)
    return None if best is None else (best[0][0], best[1])


def after(units: Sequence[Unit], path: Sequence[Step]) -> list[int]:
    """The option of every unit after these steps."""
    chosen = smallest(units)
    for step in path:
        chosen[step.unit] = step.option
    return chosen
