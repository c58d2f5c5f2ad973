"""Small graphs for tests of passes, and the four things every pass is tested for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ouro_compiler.frontend.capture import export
from ouro_compiler.graph import is_op
from ouro_compiler.passes.base import Pass, PassContext, run_passes

aten = torch.ops.aten
ouro = torch.ops.ouro


class Written(nn.Module):
    """A module whose forward is a function of (module, x); parameters and layers by keyword."""

    def __init__(
        self, forward: Callable[[Any, Tensor], Any], **members: Tensor | nn.Module
    ) -> None:
        super().__init__()
        self.function = forward
        for name, member in members.items():
            if isinstance(member, nn.Module):
                self.add_module(name, member)
            else:
                self.register_parameter(name, nn.Parameter(member))

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def capture_small(module: nn.Module, x: Tensor) -> fx.GraphModule:
    """The graph of a module in eval mode, with a dynamic batch; in-place writes stay, as they do in
    graphs from Dynamo."""
    gm = export(module.eval(), x).module(check_guards=False)
    assert isinstance(gm, fx.GraphModule)
    return gm


def count(gm: fx.GraphModule, *targets: Any) -> int:
    """Number of calls of these ops."""
    return sum(is_op(node, *targets) for node in gm.graph.nodes)


def calls(gm: fx.GraphModule, target: Any) -> list[fx.Node]:
    """Calls of an op, in order."""
    return [node for node in gm.graph.nodes if is_op(node, target)]


def other_batches(x: Tensor) -> list[Tensor]:
    """Inputs with batches that differ from the example's: one sample, and more samples."""
    return [x[:1] * 0.5, torch.cat([x, x.flip(-1) * 1.5, x[:1] - 0.25])]


def run(gm: fx.GraphModule, *passes: Pass) -> bool:
    """Run passes with the runner; returns whether any changed the graph."""
    return bool(run_passes(gm, passes, PassContext()))


def outputs(function: Callable[[Tensor], Any], x: Tensor) -> list[list[Tensor]]:
    """Results for every other batch, as flat lists of tensors."""
    found: list[list[Tensor]] = []
    for batch in other_batches(x):
        with torch.no_grad():
            result = function(batch)
        found.append([result] if isinstance(result, Tensor) else list(result))
    return found


def assert_same(actual: list[list[Tensor]], expected: list[list[Tensor]], tolerance: float) -> None:
    """Equal bit by bit for tolerance 0, else within it."""
    for ours, theirs in zip(actual, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert a.shape == b.shape
            assert a.dtype == b.dtype
            if tolerance == 0:
                assert torch.equal(a, b)
            else:
                torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def assert_pass(
    one: Pass,
    module: nn.Module,
    x: Tensor,
    *,
    before: Mapping[Any, int],
    after: Mapping[Any, int],
    tolerance: float = 0.0,
    prepare: Sequence[Pass] = (),
) -> fx.GraphModule:
    """The pass fires: op counts before and after, equal outputs; a second run changes nothing."""
    gm = capture_small(module, x)
    run(gm, *prepare)
    assert {target: count(gm, target) for target in before} == dict(before)
    expected = outputs(gm, x)
    assert run(gm, one), "the pass did not fire"
    assert {target: count(gm, target) for target in after} == dict(after), gm.print_readable(False)
    assert_same(outputs(gm, x), expected, tolerance)
    assert not one(gm, PassContext()), "a second run says it changed something"
    return gm


def assert_leaves_alone(
    one: Pass, module: nn.Module, x: Tensor, *, prepare: Sequence[Pass] = ()
) -> None:
    """The pass returns False and edits nothing."""
    gm = capture_small(module, x)
    run(gm, *prepare)
    before = [node.format_node() for node in gm.graph.nodes]
    assert not one(gm, PassContext())
    assert [node.format_node() for node in gm.graph.nodes] == before
