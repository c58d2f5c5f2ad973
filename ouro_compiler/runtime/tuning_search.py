"""The search for one task's choice: what was tried and found, as the table keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ouro_compiler.kernels.candidates import Choice
from ouro_compiler.kernels.tuning_table import Key, Row
from ouro_compiler.runtime.tuning_tasks import Task, shape_of
from ouro_compiler.runtime.tuning_trials import RefusedError, Trials

FASTER = 0.98  # of the default's median that a choice's must not exceed


@dataclass
class Search:
    """A task while it is tuned: what its rows in the table say, and the trials that go on.

    choice: the fastest candidate by FASTER, None so far. trials: of its launches on real memory.
    """

    task: Task
    choice: Choice | None = None
    ratio: float = 1.0
    default_us: float = 0.0
    tried: list[Choice] = field(default_factory=list)
    refused: list[tuple[Choice, str]] = field(default_factory=list)
    new: int = 0
    trials: Trials | None = None

    @property
    def left(self) -> list[Choice]:
        """What is still to be tried, in order."""
        return self.task.candidates(self.choice, self.tried)

    def attempt(self, choice: Choice) -> None:
        """Try a candidate; it is the choice if it is the fastest so far, and fast enough."""
        assert self.trials is not None
        self.tried.append(choice)
        self.new += 1
        try:
            ratio = self.trials.ratio(choice)
        except RefusedError as error:
            self.refused.append((choice, str(error)))
            return
        if ratio <= FASTER and ratio < self.ratio:
            self.choice, self.ratio = choice, ratio

    def rest(self) -> None:
        """Note the default's time; free the memory of trials that are over."""
        assert self.trials is not None
        self.default_us = 1e6 * self.trials.measure_default()
        if not self.left:
            self.trials = None

    def rows(self) -> list[Row]:
        """A row of the table for each of the task's kernels."""
        return [
            Row(
                template=member.spec.template,
                digest=digest,
                bucket=bucket,
                kernel=member.spec.label.replace(" reverse", ""),
                shape=shape_of(member),
                choice=self.choice,
                ratio=self.ratio,
                default_us=self.default_us,
                tried=tuple(self.tried),
                refused=tuple(self.refused),
            )
            for (digest, bucket), member in self.task.members.items()
        ]


def resume(task: Task, rows: Mapping[Key, Row]) -> Search:
    """Where an earlier run stopped, if it tuned all kernels of the task as one."""
    found = [rows.get(key) for key in task.members]
    first = found[0]
    if first is None or any(
        one is None or (one.choice, one.tried) != (first.choice, first.tried) for one in found
    ):
        return Search(task)
    return Search(
        task,
        choice=first.choice,
        ratio=first.ratio,
        default_us=first.default_us,
        tried=list(first.tried),
        refused=list(first.refused),
    )
