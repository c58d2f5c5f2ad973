"""patched_scan: its definition, the form in chunks and their gradients, against a closed form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import ouro_compiler.ops  # noqa: F401  (registers torch.ops.ouro)
from ouro_compiler.ops import chunked_scan
from ouro_compiler.ops.patched_scan import (
    patched_scan_backward,
    patched_scan_implementation,
    patched_scan_ref,
)
from tests.helpers import assert_close, assert_opcheck, generator, randn

op = torch.ops.ouro.patched_scan
FORMS = pytest.mark.parametrize(
    "form", [patched_scan_ref, patched_scan_implementation], ids=["reference", "chunks"]
)
DIRECTIONS = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
DIFFERENTIABLE = (0, 1, 3, 4)  # u, delta, B, C


def inputs(
    side: int = 3,
    channels: int = 6,
    groups: int | None = None,
    *,
    batch: int = 4,
    states: int = 3,
    windows: int = 1,
    around: int = 1,
    class_token: int = 0,
    reverse: bool = False,
) -> list[Any]:
    """Patches on a square grid, each with those up to `around` away, in windows' own orders."""
    length, grouped = side * side + class_token, () if groups is None else (groups,)
    u, delta = (randn(seed, batch, length, channels).transpose(1, 2) for seed in (1, 2))
    A = -torch.rand(channels, states, generator=generator(3)) * 2 - 0.1
    B, C = (randn(seed, batch, *grouped, length, states).transpose(-1, -2) for seed in (4, 5))
    anchors, neighbours = [], []
    grid = torch.arange(side * side).view(side, side)
    padded = torch.nn.functional.pad(grid, (around,) * 4, value=-1)
    size = 2 * around + 1
    near = padded.unfold(0, size, 1).unfold(1, size, 1).reshape(side * side, -1)
    for window in range(windows):
        order = torch.randperm(length, generator=generator(window))
        place = torch.cat([order[: side * side], torch.tensor([-1])])
        anchors.append(place[:-1])
        neighbours.append(place[near])
    found = torch.stack(neighbours)
    weights = torch.rand(batch, *found.shape[1:], generator=generator(6))
    weights = weights * (found[torch.arange(batch) % windows] >= 0)
    return [u, delta.abs() * 0.3, A, B, C, weights, torch.stack(anchors), found, reverse]


def double(args: list[Any]) -> list[Any]:
    return [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]


def closed_form(args: list[Any]) -> Tensor:
    """y from h_t = sum_j exp(A (S_t - S_j)) delta_j B_j u_j, S the running sum of delta."""
    u, delta, A, B, C, weights, anchors, neighbours, reverse = double(args)
    batch, channels, length = u.shape
    B, C = (m[:, None] if m.dim() == 3 else m for m in (B, C))
    y = u.new_zeros(batch, anchors.shape[1], channels)
    for b in range(batch):
        for e in range(channels):
            group = e * B.shape[1] // channels
            d = delta[b, e].flip(0).cumsum(0).flip(0) if reverse else delta[b, e].cumsum(0)
            earlier = torch.ones(length, length).tril().bool()
            earlier = earlier.T if reverse else earlier
            exponent = torch.where(earlier, d[:, None] - d[None], torch.inf)
            kernel = torch.exp(exponent[..., None] * A[e])  # (t, j, N); exp(-inf) is 0
            h = torch.einsum("tjn,nj,j->tn", kernel, B[b, group], delta[b, e] * u[b, e])
            window = b % len(anchors)
            for p, anchor in enumerate(anchors[window].tolist()):
                for k, token in enumerate(neighbours[window, p].tolist()):
                    if anchor >= 0 and token >= 0:
                        y[b, p, e] += weights[b, p, k] * (C[b, group, :, anchor] @ h[token])
    return y


def with_missing(args: list[Any]) -> list[Any]:
    """Some anchors and some neighbours less; a weight of what is missing does not count."""
    args[6], args[7] = args[6].clone(), args[7].clone()
    args[6][:, ::4] = -1
    args[7][:, 1] = -1
    args[7][:, 2::3, 4] = -1
    return args


@FORMS
@DIRECTIONS
@pytest.mark.parametrize("groups", [None, 1, 2], ids=["flat", "G1", "G2"])
def test_equals_the_closed_form(form: Any, groups: int | None, reverse: bool) -> None:
    args = inputs(groups=groups, reverse=reverse, class_token=1)
    assert_close(form(*double(args)), closed_form(args), 1e-12)
    assert_close(form(*args).double(), closed_form(args), 1e-5)


@FORMS
def test_windows_and_what_is_missing(form: Any) -> None:
    args = with_missing(inputs(windows=3, batch=5, states=1))
    found = form(*double(args))
    assert_close(found, closed_form(args), 1e-12)
    assert found[:, ::4].eq(0).all()
    assert found[:, 1].eq(0).all()
    assert found[:, 2].ne(0).all()


@DIRECTIONS
@pytest.mark.parametrize("elements", [1, 400])
def test_chunks_of_time_make_no_difference(
    monkeypatch: pytest.MonkeyPatch, elements: int, reverse: bool
) -> None:
    args = double(with_missing(inputs(groups=2, windows=2, reverse=reverse)))
    grad = randn(7, 4, 9, 6).double()
    expected = [patched_scan_ref(*args), *patched_scan_backward(grad, *args)]
    monkeypatch.setattr(chunked_scan, "_CHUNK_ELEMENTS", elements)
    found = [patched_scan_implementation(*args), *patched_scan_backward(grad, *args)]
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, 1e-12)


@DIRECTIONS
@pytest.mark.parametrize("groups", [None, 2], ids=["flat", "G2"])
def test_gradients_are_the_definitions(groups: int | None, reverse: bool) -> None:
    args = with_missing(double(inputs(groups=groups, windows=2, reverse=reverse)))
    for index in DIFFERENTIABLE:
        args[index].requires_grad_()
    leaves, grad = [args[index] for index in DIFFERENTIABLE], randn(7, 4, 9, 6).double()
    expected = torch.autograd.grad(patched_scan_ref(*args), leaves, grad)
    for ours, theirs in zip(patched_scan_backward(grad, *args), expected, strict=True):
        assert_close(ours.detach(), theirs, 1e-12)


@DIRECTIONS
def test_gradcheck(reverse: bool) -> None:
    args = with_missing(double(inputs(2, 2, batch=2, states=2, windows=2, reverse=reverse)))
    for index in DIFFERENTIABLE:
        args[index] = args[index].contiguous().requires_grad_()
    assert torch.autograd.gradcheck(patched_scan_ref, args)
    assert torch.autograd.gradcheck(op, args)  # double has no kernel


def test_only_four_operands_have_gradients() -> None:
    args = inputs()
    for index in range(6):
        args[index].requires_grad_()
    op(*args).sum().backward()
    for index in range(6):
        assert (args[index].grad is not None) == (index in DIFFERENTIABLE)


def test_half_precision_is_computed_in_fp32() -> None:
    args = inputs()
    args[0] = args[0].bfloat16()
    found = patched_scan_implementation(*args)
    assert found.dtype == torch.bfloat16
    assert_close(found.double(), closed_form(args), 8e-3)


@pytest.mark.parametrize(("groups", "reverse"), [(None, False), (2, True)])
def test_opcheck(groups: int | None, reverse: bool) -> None:
    args = with_missing(inputs(groups=groups, windows=2, reverse=reverse))
    assert_opcheck(torch.ops.ouro.patched_scan_backward, (randn(7, 4, 9, 6), *args))
    for index in DIFFERENTIABLE:
        args[index].requires_grad_()
    assert_opcheck(op, tuple(args))


@pytest.mark.parametrize(
    ("index", "changed", "message"),
    [
        (1, torch.ones(1), "must share one shape"),
        (5, torch.ones(4, 9, 8), r"weights must be \(B, P, K\)"),
        (6, torch.zeros(1, 9, dtype=torch.int32), "anchors must be int64"),
        (6, torch.zeros(2, 9, dtype=torch.int64), r"neighbours \(W, P, K\)"),
    ],
)
def test_operands_that_do_not_fit(index: int, changed: Tensor, message: str) -> None:
    args = inputs()
    args[index] = changed
    with pytest.raises(ValueError, match=message):
        op(*args)
