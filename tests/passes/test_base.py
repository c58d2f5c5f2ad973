"""The runner: order, cleaning, fresh values, errors that name the pass; the graph's invariants."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, fx, nn

from ouro_compiler.frontend.capture import batch_dimension_is_dynamic
from ouro_compiler.graph import verify_graph
from ouro_compiler.passes.base import PassContext, PassError, pass_name, run_passes
from tests.helpers import randn
from tests.passes.graphs import Written, aten, calls, capture_small, count

X = randn(0, 2, 9, 8)


def _graph() -> fx.GraphModule:
    return capture_small(Written(lambda m, x: torch.exp(x) * 2), X)


def nothing(gm: fx.GraphModule, ctx: PassContext) -> bool:
    del gm, ctx
    return False


def sum_instead(gm: fx.GraphModule, ctx: PassContext) -> bool:
    """Changes a shape, leaves a dead node and does not set values."""
    del ctx
    (exp,) = calls(gm, aten.exp.default)
    with gm.graph.inserting_after(exp):
        total = gm.graph.call_function(aten.sum.dim_IntList, (exp, [1]))
        gm.graph.call_function(aten.neg.default, (exp,))
    exp.replace_all_uses_with(total, delete_user_cb=lambda user: user.target is aten.mul.Tensor)
    return True


def broken(gm: fx.GraphModule, ctx: PassContext) -> bool:
    del gm, ctx
    raise RuntimeError("no such thing")


def calls_a_module(gm: fx.GraphModule, ctx: PassContext) -> bool:
    del ctx
    gm.add_module("layer", nn.Identity())
    (exp,) = calls(gm, aten.exp.default)
    with gm.graph.inserting_after(exp):
        new = gm.graph.call_module("layer", (exp,))
    exp.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    return True


def test_the_runner_cleans_and_refreshes_values() -> None:
    gm = _graph()
    assert run_passes(gm, [nothing, sum_instead, nothing], PassContext()) == ["sum_instead"]
    assert count(gm, aten.neg.default) == 0  # dead
    (mul,) = calls(gm, aten.mul.Tensor)
    assert mul.meta["val"].shape[1:] == (8,)
    assert isinstance(mul.meta["val"].shape[0], torch.SymInt)
    batch = randn(1, 5, 9, 8)
    torch.testing.assert_close(gm(batch), torch.exp(batch).sum(1) * 2)


def test_fresh_values_keep_the_batch_dynamic() -> None:
    """A kernel that reads sizes as integers would fix them."""

    def pad_instead(gm: fx.GraphModule, ctx: PassContext) -> bool:
        [node] = calls(gm, aten.relu.default)
        node.target, node.args = aten.constant_pad_nd.default, (node.args[0], [0, 1])
        return True

    gm = capture_small(Written(lambda m, x: torch.relu(x)), randn(0, 2, 3))
    run_passes(gm, [pad_instead], PassContext())
    assert batch_dimension_is_dynamic(gm)
    assert gm(randn(1, 5, 3)).shape == (5, 4)


def test_an_error_names_the_pass_and_its_predecessors() -> None:
    with pytest.raises(PassError, match=r"broken failed .*nothing, sum_instead\): no such thing"):
        run_passes(_graph(), [nothing, sum_instead, broken, nothing], PassContext())
    with pytest.raises(PassError, match=r"broken failed \(passes before it: none\)"):
        run_passes(_graph(), [broken], PassContext())


def test_a_pass_that_breaks_an_invariant_is_named() -> None:
    with pytest.raises(PassError, match="pass calls_a_module failed"):
        run_passes(_graph(), [calls_a_module], PassContext())


def test_each_pass_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="ouro_compiler.passes.base"):
        run_passes(_graph(), [nothing, sum_instead], PassContext())
    messages = [record.getMessage() for record in caplog.records if "nodes" in record.getMessage()]
    assert messages[0].startswith("nothing: -")
    assert messages[1].startswith("sum_instead: changed")


def test_a_pass_goes_by_its_functions_name() -> None:
    assert pass_name(nothing) == "nothing"


def test_a_captured_graph_is_valid() -> None:
    verify_graph(_graph())


def test_modules_are_rejected() -> None:
    gm = _graph()
    calls_a_module(gm, PassContext())
    with pytest.raises(ValueError, match="call_module nodes are not allowed"):
        verify_graph(gm)


def _foreign(x: Tensor) -> Tensor:
    return x


@pytest.mark.parametrize(
    "target", [torch.exp, _foreign, torch.ops.prims.exp.default], ids=["torch", "python", "prims"]
)
def test_foreign_ops_are_rejected(target: object) -> None:
    gm = _graph()
    (exp,) = calls(gm, aten.exp.default)
    exp.target = target
    with pytest.raises(ValueError, match="aten"):
        verify_graph(gm)


def test_nodes_without_a_value_are_rejected() -> None:
    gm = _graph()
    del calls(gm, aten.exp.default)[0].meta["val"]
    with pytest.raises(ValueError, match="has no meta"):
        verify_graph(gm)
