"""concatenate_tokens: a concatenation of channels that is read as tokens is one of tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ouro_compiler.passes.concatenate_tokens import concatenate_tokens
from tests.helpers import randn
from tests.passes.graphs import Written, assert_leaves_alone, assert_pass, aten, calls

CAT, TRANSPOSE = aten.cat.default, aten.transpose.int
X = randn(0, 2, 6, 9)


def test_read_as_tokens() -> None:
    """MambaVision's mixer: scan and convolution side by side, before out_proj."""
    gm = assert_pass(
        concatenate_tokens,
        Written(lambda m, x: torch.cat((x.sin(), x.cos()), 1).transpose(1, 2) * 2),
        X,
        before={CAT: 1, TRANSPOSE: 1},
        after={CAT: 1, TRANSPOSE: 2},
    )
    (cat,) = calls(gm, CAT)
    assert cat.args[1] == 2
    assert cat.meta["val"].is_contiguous()


def test_several_readers_and_spellings() -> None:
    def forward(m: object, x: Tensor) -> Tensor:
        y = torch.cat((x, x * 2, x[:, :1]), -2)
        return y.mT + y.permute(0, 2, 1).exp() * y.transpose(-1, -2)

    assert_pass(
        concatenate_tokens, Written(forward), X, before={CAT: 1}, after={CAT: 1, TRANSPOSE: 3}
    )


NEAR_MISSES = {
    "read otherwise too": Written(
        lambda m, x: (lambda y: y.transpose(1, 2).sum(1) + y.sum(2))(torch.cat((x, x), 1))
    ),
    "along time": Written(lambda m, x: torch.cat((x, x), 2).transpose(1, 2)),
    "of maps": Written(lambda m, x: torch.cat((x[..., None], x[..., None]), 1).transpose(1, 2)),
    "turned otherwise": Written(lambda m, x: torch.cat((x, x), 1).transpose(0, 1)),
    "written in place": Written(lambda m, x: torch.cat((x, x), 1).transpose(1, 2).mul_(2.0)),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_stay(name: str) -> None:
    assert_leaves_alone(concatenate_tokens, NEAR_MISSES[name], X)
