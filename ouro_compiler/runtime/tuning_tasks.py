"""What there is to tune in a model at one batch size: launches that share a choice, on real memory.

Kernels that are one launch in a schedule stay one only if they run with the same blocks and warps:
they are one task, with all that they are grouped with elsewhere.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from torch import Tensor, fx

from ouro_compiler.kernels.candidates import (
    Choice,
    candidates,
    current_choice,
    free_values,
    offered_on,
)
from ouro_compiler.kernels.grouping import MOST_MEMBERS, join, joinable, split
from ouro_compiler.kernels.launch import Launch
from ouro_compiler.kernels.retile import retile
from ouro_compiler.kernels.spec import Template
from ouro_compiler.kernels.tuned import defaults_only, key_of, machine_of
from ouro_compiler.kernels.tuning_table import Key
from ouro_compiler.runtime.schedule import Schedule

_OPERATIONS_A_BYTE = 400  # that a GPU computes in int8 while it moves a byte: an order of magnitude


@dataclass(frozen=True, kw_only=True)
class Task:
    """Kernels that run with one choice, as they are launched by default.

    steps: of the schedule, one for each of its different launches, and those launches. members:
    one launch a key. work: bytes or operations of all that run so, as a measure of time.
    """

    steps: tuple[int, ...]
    launches: tuple[Launch, ...]
    members: dict[Key, Launch]
    work: float

    @property
    def label(self) -> str:
        """What tables call it."""
        return " + ".join(dict.fromkeys(one.spec.label for one in self.launches))

    def candidates(self, best: Choice | None, tried: Collection[Choice]) -> list[Choice]:
        """What is still to be tried, in order, by all of its kernels on their device."""
        machine = machine_of(self.launches[0].args[0].device)
        first, *rest = [
            candidates(one.spec, best or current_choice(one.spec), bucket)
            for (_, bucket), one in self.members.items()
        ]
        return [
            one
            for one in first
            if one not in tried and offered_on(machine, one) and all(one in other for other in rest)
        ]


def schedule_of(gm: fx.GraphModule, images: Tensor) -> Schedule:
    """The schedule of a graph with every kernel as it is by default."""
    with defaults_only():
        return Schedule(gm, images)


def find_tasks(schedule: Schedule) -> list[Task]:
    """The tasks of a schedule by default, those that take longest first."""
    steps = {
        number: split(step)
        for number, step in enumerate(schedule.steps)
        if isinstance(step, Launch) and 0 not in step.grid
    }
    keys = {
        number: [key_of(one.spec, one.args) for one in members]
        for number, members in steps.items()
        if free_values(members[0].spec)
    }
    found = []
    for together in _clusters(keys.values()):
        numbers = [number for number, one in keys.items() if together.issuperset(one)]
        different: dict[object, int] = {}
        for number in numbers:
            different.setdefault((*keys[number], *(one.grid for one in steps[number])), number)
        members = {
            key: member
            for number in numbers
            for key, member in zip(keys[number], steps[number], strict=True)
        }
        launches = [schedule.steps[number] for number in different.values()]
        found.append(
            Task(
                steps=tuple(different.values()),
                launches=tuple(one for one in launches if isinstance(one, Launch)),
                members=members,
                work=sum(_work(member) for number in numbers for member in steps[number]),
            )
        )
    return sorted((one for one in found if one.candidates(None, ())), key=lambda one: -one.work)


def retiled(launches: Iterable[Launch], choice: Choice) -> list[Launch]:
    """Launches, single ones or groups, with a choice, as a schedule would then launch them."""
    found: list[Launch] = []
    for launch in launches:
        alike: dict[object, list[Launch]] = {}
        for member in split(launch):
            one = retile(member, choice)
            alike.setdefault(joinable(one), []).append(one)
        for members in alike.values():
            groups = range(0, len(members), MOST_MEMBERS)
            found += [join(members[first : first + MOST_MEMBERS]) for first in groups]
    return found


def observed(schedule: Schedule, images: Tensor, tasks: Iterable[Task]) -> dict[int, Launch]:
    """The launches of tasks by step, on the memory that they had in one run on images."""
    wanted = {number for task in tasks for number in task.steps}
    found: dict[int, Launch] = {}

    def observe(index: int, launch: Launch) -> None:
        if index in wanted:
            found[index] = launch

    schedule(images, observe)
    return found


def shape_of(launch: Launch) -> str:
    """The sizes of a single launch: rows x columns, and the outputs of a product."""
    constants = dict(launch.spec.constants)
    rows = int(launch.args[0].shape[0]) * constants["LENGTH"]
    columns = constants.get("COLUMNS", constants.get("CHANNELS"))
    text = f"{rows} x {columns}"
    return f"{text} -> {constants['OUTPUTS']}" if "OUTPUTS" in constants else text


def _clusters(groups: Iterable[Iterable[Key]]) -> list[set[Key]]:
    """Keys that are in a group with one another, directly or not."""
    found: list[set[Key]] = []
    for group in groups:
        one = set(group)
        for other in [each for each in found if each & one]:
            found.remove(other)
            one |= other
        found.append(one)
    return found


def _work(launch: Launch) -> float:
    tensors = [one for one in launch.args if isinstance(one, Tensor)]
    moved = sum(one.numel() * one.element_size() for one in tensors)
    if launch.spec.template is not Template.LINEAR:
        return float(moved)
    rows = int(launch.args[0].shape[0]) * launch.spec["LENGTH"]
    products = 2 * rows * launch.spec["COLUMNS"] * launch.spec["OUTPUTS"]
    return max(float(moved), products / _OPERATIONS_A_BYTE)
