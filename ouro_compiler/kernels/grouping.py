"""Independent launches of one template as one launch, where data dependence allows.

The two directions of a Vision Mamba are independent until they are summed: what one launches, the
other does too. A graph's launches are steps that read and write memory; steps are put into an order
in which launches that could share one come together.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from ouro_compiler.kernels.codegen import template_functions
from ouro_compiler.kernels.group_codegen import parameters_of, written_parameters
from ouro_compiler.kernels.launch import Launch
from ouro_compiler.kernels.spec import Template

MOST_MEMBERS = 8  # a group's parameters and code stay small


@dataclass(frozen=True, kw_only=True)
class Access:
    """What a step does to memory: numbers of what it reads and writes, and what it may join.

    key: steps of equal keys may be one; None where a step stays alone.
    """

    reads: frozenset[int]
    writes: frozenset[int]
    key: Hashable = None


def group_steps(steps: Sequence[Access], most: int = MOST_MEMBERS) -> list[list[int]]:
    """Numbers of steps in an order to run them in, those that become one together, ascending.

    Each step's results are those of the given order: whatever must come before a step is in an
    earlier group. A step waits for partners that it does not depend on, as long as another can run.
    """
    before = _ancestors(steps)
    waiting = dict.fromkeys(range(len(steps)))
    order: list[list[int]] = []
    while waiting:
        left = sum(1 << number for number in waiting)
        ready = [number for number in waiting if not before[number] & left]
        chosen = next((one for one in ready if _is_whole(one, ready, waiting, steps, before)), None)
        first = ready[0] if chosen is None else chosen
        group = [first]
        if steps[first].key is not None:
            group = [one for one in ready if steps[one].key == steps[first].key][:most]
        for number in group:
            del waiting[number]
        order.append(group)
    return order


def _ancestors(steps: Sequence[Access]) -> list[int]:
    """For each step the set, as bits, of all that must come before it."""
    found: list[int] = []
    written: dict[int, int] = {}  # by number: who wrote it, and all that came before those
    touched: dict[int, int] = {}
    for number, step in enumerate(steps):
        bits = 0
        for one in step.reads | step.writes:
            bits |= written.get(one, 0)
        for one in step.writes:
            bits |= touched.get(one, 0)
        found.append(bits)
        for one in step.reads | step.writes:
            touched[one] = touched.get(one, 0) | bits | 1 << number
        for one in step.writes:
            written[one] = written.get(one, 0) | bits | 1 << number
    return found


def _is_whole(
    first: int,
    ready: Sequence[int],
    waiting: dict[int, None],
    steps: Sequence[Access],
    before: Sequence[int],
) -> bool:
    """Can all that could join a step run now?"""
    if steps[first].key is None:
        return True
    return all(
        one in ready or before[one] >> first & 1
        for one in waiting
        if steps[one].key == steps[first].key
    )


def joinable(launch: Launch) -> Hashable:
    """Launches of equal keys can be one: of one template, on equal grids, with equal options."""
    spec = launch.spec
    return (spec.template, launch.grid, spec.num_warps, spec.num_stages)


def join(launches: Sequence[Launch]) -> Launch:
    """One launch that computes what the given ones do, in any order among them."""
    first, *rest = launches
    if not rest:
        return first
    if len({joinable(one) for one in launches}) > 1 or any(one.spec.others for one in launches):
        raise ValueError("only single launches of one template on equal grids can be one")
    return Launch(
        spec=dataclasses.replace(first.spec, others=tuple(one.spec for one in rest)),
        grid=(first.grid[0] * len(launches), *first.grid[1:]),
        args=tuple(arg for one in launches for arg in one.args),
    )


def split(launch: Launch) -> list[Launch]:
    """The launches that `join` made one; any other launch alone."""
    members = launch.spec.members
    count = len(launch.args) // len(members)
    grid = (launch.grid[0] // len(members), *launch.grid[1:])
    return [
        Launch(spec=spec, grid=grid, args=launch.args[number * count : (number + 1) * count])
        for number, spec in enumerate(members)
    ]


def written(launch: Launch) -> tuple[bool, ...]:
    """For each argument of a single launch: may its kernel store through it?"""
    return _written(launch.spec.template)


@functools.cache
def _written(template: Template) -> tuple[bool, ...]:
    functions = template_functions(template)
    name = f"{template.value}_kernel"
    found = written_parameters(name, functions)
    return tuple(one in found for one in parameters_of(functions[name]))
