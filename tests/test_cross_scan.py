"""cross_scan and cross_merge against walks over the pixels, one after the other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import ouro_compiler.ops  # noqa: F401  (registers torch.ops.ouro)
from tests.helpers import assert_batch_invariant, assert_close, assert_opcheck, randn, shares_memory

scan, merge = torch.ops.ouro.cross_scan, torch.ops.ouro.cross_merge
SIZES = [(3, 5), (4, 4), (1, 6), (6, 1), (1, 1)]


def _walks(height: int, width: int) -> list[list[tuple[int, int]]]:
    """The pixels in the order of each of the four scans."""
    rows = [(i, j) for i in range(height) for j in range(width)]
    columns = [(i, j) for j in range(width) for i in range(height)]
    return [rows, columns, rows[::-1], columns[::-1]]


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_four_walks(height: int, width: int, dtype: torch.dtype) -> None:
    x = randn(0, 2, 3, height, width).to(dtype)
    y = scan(x)
    assert (y.shape, y.dtype) == ((2, 4, 3, height * width), dtype)
    for order, walk in enumerate(_walks(height, width)):
        for t, (i, j) in enumerate(walk):
            assert torch.equal(y[:, order, :, t], x[:, :, i, j])


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_the_merge_adds_up_what_the_walks_met(height: int, width: int) -> None:
    y = randn(1, 2, 4, 3, height * width)
    expected = torch.zeros(2, 3, height, width)
    for order, walk in enumerate(_walks(height, width)):
        for t, (i, j) in enumerate(walk):
            expected[:, :, i, j] += y[:, order, :, t]
    assert_close(merge(y, height, width), expected.flatten(2), 1e-6)


def test_a_merged_scan_is_four_times_the_map() -> None:
    x = randn(0, 2, 3, 3, 5)
    assert torch.equal(merge(scan(x), 3, 5), 4 * x.flatten(2))


def test_each_is_the_transpose_of_the_other() -> None:
    x, y = randn(0, 2, 3, 3, 5).double(), randn(1, 2, 4, 3, 15).double()
    torch.testing.assert_close((scan(x) * y).sum(), (x.flatten(2) * merge(y, 3, 5)).sum())


def test_gradients() -> None:
    x = randn(0, 1, 2, 2, 3).double().requires_grad_()
    y = randn(1, 1, 4, 2, 6).double().requires_grad_()
    assert torch.autograd.gradcheck(scan, (x,))
    assert torch.autograd.gradcheck(lambda value: merge(value, 2, 3), (y,))
    assert torch.autograd.gradgradcheck(scan, (x,))


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_opcheck(layout: torch.memory_format, requires_grad: bool) -> None:
    x = randn(0, 2, 3, 3, 5).to(memory_format=layout).requires_grad_(requires_grad)
    assert_opcheck(scan, (x,))
    y = randn(1, 2, 4, 3, 15).to(memory_format=layout).requires_grad_(requires_grad)
    assert_opcheck(merge, (y, 3, 5))


def test_results_are_contiguous_and_their_own() -> None:
    for x in (randn(0, 2, 3, 3, 5), randn(0, 2, 3, 3, 5).to(memory_format=torch.channels_last)):
        y = scan(x)
        merged = merge(y, 3, 5)
        assert y.is_contiguous()
        assert merged.is_contiguous()
        assert not shares_memory(x, y)
        assert not shares_memory(y, merged)


def test_batch_invariance() -> None:
    assert_batch_invariant(scan, randn(0, 3, 2, 4, 3))
    assert_batch_invariant(lambda y: merge(y, 4, 3), randn(1, 3, 4, 2, 12))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: scan(torch.ones(2, 3, 4)), "cross_scan: x must be"),
        (lambda: merge(torch.ones(2, 3, 4, 6), 2, 3), "cross_merge: y must be"),
        (lambda: merge(torch.ones(2, 4, 6), 2, 3), "cross_merge: y must be"),
        (lambda: merge(torch.ones(2, 4, 3, 6), 2, 4), "6 tokens are no map of 2 x 4"),
        (lambda: merge(torch.ones(2, 4, 3, 6), -2, -3), "no map of -2 x -3"),
    ],
)
def test_refusals(call: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()  # type: ignore[operator]


def test_export_keeps_them_whole() -> None:
    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return merge(scan(x), 3, 5)

    batch = torch.export.Dim("batch", min=1, max=8)
    x = randn(0, 2, 3, 3, 5)
    program = torch.export.export(Module(), (x,), dynamic_shapes=({0: batch},))
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert targets == [scan.default, merge.default]
    assert torch.equal(program.module()(x[:1]), merge(scan(x[:1]), 3, 5))
