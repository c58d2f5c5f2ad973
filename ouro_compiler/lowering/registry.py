"""Lowering rules, looked up by op. Passes match patterns; a rule packs one node's constants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx


@dataclass(frozen=True, kw_only=True)
class LoweringRule:
    """What becomes of one op.

    supports(gm, node) returns None, or why this node cannot be lowered: the report prints it.
    lower(gm, node) edits the node in place; it is called only where supports returned None.
    """

    target: Any
    supports: Callable[[fx.GraphModule, fx.Node], str | None]
    lower: Callable[[fx.GraphModule, fx.Node], None]


RULES: dict[Any, LoweringRule] = {}


def register(rule: LoweringRule) -> LoweringRule:
    """Add a rule; one op has one rule."""
    if rule.target in RULES:
        raise ValueError(f"{rule.target} already has a lowering rule")
    RULES[rule.target] = rule
    return rule
