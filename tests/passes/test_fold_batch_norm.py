"""fold_batch_norm: the convolution before a batch norm does both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ouro_compiler.graph import get_constant
from ouro_compiler.passes.fold_batch_norm import fold_batch_norm
from tests.helpers import generator, randn
from tests.passes.graphs import Written, assert_leaves_alone, assert_pass, aten, calls

NORM = aten.batch_norm.default
X, TOKENS = randn(0, 2, 4, 6, 5), randn(1, 2, 4, 9)


def trained(norm: nn.Module) -> Any:
    """A norm whose statistics and parameters are those of training, in eval mode."""
    made = generator(3)
    for name, value in (*norm.named_buffers(), *norm.named_parameters()):
        if value.dim() == 1:
            wide = "var" in name or name == "weight"
            random = torch.rand(value.shape, generator=made)
            value.data = random * 3 + 0.05 if wide else random - 0.5
    return norm.eval()


def conv(**options: Any) -> nn.Conv2d:
    return nn.Conv2d(4, 6, 3, **{"padding": 1, **options})


FOLDED: dict[str, tuple[nn.Module, nn.Module, Tensor]] = {
    "map": (conv(), trained(nn.BatchNorm2d(6)), X),
    "no bias": (conv(bias=False), trained(nn.BatchNorm2d(6, eps=1e-2)), X),
    "strided, in groups": (conv(stride=2, groups=2), trained(nn.BatchNorm2d(6)), X),
    "same": (conv(padding="same"), trained(nn.BatchNorm2d(6, affine=False)), X),
    "tokens": (nn.Conv1d(4, 5, 3), trained(nn.BatchNorm1d(5)), TOKENS),
}


@pytest.mark.parametrize("name", FOLDED)
def test_folded(name: str) -> None:
    convolution, norm, x = FOLDED[name]
    gm = assert_pass(
        fold_batch_norm,
        Written(lambda m, x: m.norm(m.conv(x)).relu(), conv=convolution, norm=norm),
        x,
        before={NORM: 1},
        after={NORM: 0},
        tolerance=1e-5,
    )
    (node,) = (one for one in gm.graph.nodes if "conv" in str(one.target) and one.op != "get_attr")
    assert node.args[1].target == "conv.weight_folded"
    assert node.args[2].target in ("conv.bias_folded", "conv.folded_bias")
    weight = get_constant(gm, node.args[1])
    assert weight is not None
    scale = (norm.running_var + norm.eps).rsqrt() * (1 if norm.weight is None else norm.weight)  # type: ignore
    expected = convolution.weight.detach().flatten(1) * scale.detach()[:, None]  # type: ignore
    torch.testing.assert_close(weight.flatten(1), expected)
    names = {name for name, _ in (*gm.named_parameters(), *gm.named_buffers())}
    assert names == {"conv.weight_folded", str(node.args[2].target)}


def test_two_norms_of_one_convolution_that_runs_twice() -> None:
    """Each call gets parameters of its own."""
    gm = assert_pass(
        fold_batch_norm,
        Written(
            lambda m, x: m.first(m.conv(x)) + m.second(m.conv(x)),
            conv=conv(),
            first=trained(nn.BatchNorm2d(6)),
            second=trained(nn.BatchNorm2d(6, eps=0.5)),
        ),
        X,
        before={NORM: 2},
        after={NORM: 0, aten.conv2d.default: 2},
        tolerance=1e-5,
    )
    first, second = calls(gm, aten.conv2d.default)
    assert first.args[1].target != second.args[1].target


def tiny_variance() -> Any:
    norm = trained(nn.BatchNorm2d(6, eps=0.0))
    norm.running_var.zero_()
    return norm


NEAR_MISSES: dict[str, Written] = {
    "read before the norm too": Written(
        lambda m, x: (lambda y: m.norm(y) + y)(m.conv(x)),
        conv=conv(),
        norm=trained(nn.BatchNorm2d(6)),
    ),
    "behind an activation": Written(
        lambda m, x: m.norm(m.conv(x).relu()), conv=conv(), norm=trained(nn.BatchNorm2d(6))
    ),
    "no convolution": Written(lambda m, x: m.norm(x), norm=trained(nn.BatchNorm2d(4))),
    "transposed": Written(
        lambda m, x: m.norm(m.conv(x)),
        conv=nn.ConvTranspose2d(4, 6, 3),
        norm=trained(nn.BatchNorm2d(6)),
    ),
    "statistics of the batch": Written(
        lambda m, x: m.norm(m.conv(x)),
        conv=conv(),
        norm=nn.BatchNorm2d(6, track_running_stats=False),
    ),
    "statistics that are computed": Written(
        lambda m, x: torch.batch_norm(
            m.conv(x), None, None, m.mean + x.mean(), m.var, False, 0.1, 1e-5, False
        ),
        conv=conv(),
        mean=torch.zeros(6),
        var=torch.ones(6),
    ),
    "a weight that is not finite": Written(
        lambda m, x: m.norm(m.conv(x)), conv=conv(), norm=tiny_variance()
    ),
    "half precision": Written(
        lambda m, x: m.norm(m.conv(x.half())), conv=conv().half(), norm=nn.BatchNorm2d(6).half()
    ),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_stay(name: str) -> None:
    assert_leaves_alone(fold_batch_norm, NEAR_MISSES[name], X)
