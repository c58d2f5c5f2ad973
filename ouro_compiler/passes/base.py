"""The pass contract and the runner.

A pass edits `gm` in place and returns whether it changed anything. Dead nodes, lint, recompilation,
fresh meta["val"], the invariants and the log are the runner's work, once after each pass.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from ouro_compiler.config import QuantConfig
from ouro_compiler.errors import ModelError
from ouro_compiler.graph import (
    Calibration,
    Site,
    evaluating_fakes,
    get_constant,
    verify_graph,
)

logger = logging.getLogger(__name__)


# The pass's name, whether it changed the graph, and the graph: to be read, not edited.
OnPass = Callable[[str, bool, fx.GraphModule], None]


@dataclass(kw_only=True)
class PassContext:
    """What passes may read: the configuration, and when quantizing sites and their calibration."""

    config: QuantConfig = field(default_factory=QuantConfig)
    sites: Sequence[Site] = ()
    calibration: Calibration = field(default_factory=Calibration)
    notes: list[str] = field(default_factory=list)  # for the report; passes add to it
    on_pass: OnPass | None = None  # called after each pass, on the cleaned graph


Pass = Callable[[fx.GraphModule, PassContext], bool]


class PassError(ModelError):
    """A pass failed; the message names it and the passes that ran before it."""


def pass_name(one: Pass) -> str:
    """The name a pass goes by in logs, errors and `--after`: its function's."""
    return str(getattr(one, "__name__", one))


def run_passes(gm: fx.GraphModule, passes: Sequence[Pass], ctx: PassContext) -> list[str]:
    """Run passes in order; returns the names of those that changed the graph.

    Raises PassError, with the failing pass and its predecessors, whatever goes wrong inside one.
    """
    done: list[str] = []
    changed: list[str] = []
    for one in passes:
        name = pass_name(one)
        try:
            modified = one(gm, ctx)
            if modified:
                clean_graph(gm)
                changed.append(name)
        except Exception as error:
            before = ", ".join(done) or "none"
            raise PassError(f"pass {name} failed (passes before it: {before}): {error}") from error
        logger.info("%s: %s, %d nodes", name, "changed" if modified else "-", len(gm.graph.nodes))
        done.append(name)
        if ctx.on_pass is not None:
            ctx.on_pass(name, modified, gm)
    return changed


def clean_graph(gm: fx.GraphModule) -> None:
    """Drop dead nodes, lint, recompile, refresh meta["val"] and check the invariants."""
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    refresh_values(gm)
    verify_graph(gm)


def refresh_values(gm: fx.GraphModule) -> None:
    """Recompute every node's fake value from the placeholders'."""
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    inputs = [node.meta["val"] for node in placeholders]
    _FakeValues(gm, inputs[0].fake_mode).run(*inputs, enable_io_processing=False)


class _FakeValues(fx.Interpreter):
    """Interprets a graph on fake tensors, keeping each result as meta["val"]."""

    def __init__(self, gm: fx.GraphModule, fake_mode: Any) -> None:
        super().__init__(gm)
        self.fake_mode = fake_mode

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "get_attr":
            constant = get_constant(self.module, n)  # type: ignore[arg-type]
            value: Any = self.fake_mode.from_tensor(constant, static_shapes=True)
        elif n.op == "output":
            return super().run_node(n)
        else:
            with evaluating_fakes(self.fake_mode):
                value = super().run_node(n)
        n.meta["val"] = value
        return value
