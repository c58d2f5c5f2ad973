"""The patched scan in generated C++ and its gradients, against the definition in double."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import ouro_compiler.kernels.cpu  # noqa: F401  (registers the kernels)
from ouro_compiler.kernels.cpp.patched_scan import patched_scan, patched_scan_backward
from ouro_compiler.kernels.dispatch import ReferenceWarning
from ouro_compiler.kernels.launch import record_launches
from ouro_compiler.ops.patched_scan import patched_scan_ref
from tests.helpers import assert_close, assert_opcheck, randn
from tests.test_patched_scan import DIFFERENTIABLE, double, with_missing
from tests.test_patched_scan import inputs as make_inputs

op, backward = torch.ops.ouro.patched_scan, torch.ops.ouro.patched_scan_backward
ROUNDING = 1e-5
STATES = 9  # two of four at a time, or one of eight, and one more
DIRECTIONS = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
# A reference in the place of a kernel is a failure, but where its warning is expected.
pytestmark = pytest.mark.filterwarnings("error::ouro_compiler.kernels.dispatch.ReferenceWarning")


def inputs(*sizes: Any, states: int = STATES, **options: Any) -> list[Any]:
    """Every operand; of one number of states in most tests, for which one kernel is compiled."""
    return make_inputs(*sizes, states=states, **options)


def _gradient(args: list[Any], seed: int = 7) -> Tensor:
    return randn(seed, args[0].shape[0], args[6].shape[1], args[0].shape[1]).to(args[0].dtype)


def _assert_like_the_definition(args: list[Any], grad: Tensor | None = None) -> None:
    """Output and gradients have their operands' dtypes and the values of the definition."""
    grad = _gradient(args) if grad is None else grad
    found = [op(*args), *backward(grad, *args)]
    exact = double(args)
    leaves = [exact[index].requires_grad_() for index in DIFFERENTIABLE]
    y = patched_scan_ref(*exact)
    expected = [y.detach(), *torch.autograd.grad(y, leaves, grad.double())]
    operands = [args[index] for index in (0, *DIFFERENTIABLE)]
    for ours, theirs, operand in zip(found, expected, operands, strict=True):
        assert ours.dtype == operand.dtype
        assert_close(ours.double(), theirs, max(ROUNDING, torch.finfo(operand.dtype).eps))


@pytest.mark.parametrize(
    ("side", "channels", "groups", "states", "windows", "around", "class_token", "reverse"),
    [
        (7, 96, None, 16, 1, 2, 1, False),  # a digit
        (14, 40, None, 16, 1, 2, 1, False),  # Vim
        (14, 40, None, 16, 1, 2, 1, True),
        (14, 8, None, 16, 1, 3, 1, False),
        (16, 24, 4, 1, 1, 2, 0, False),  # VMamba
        (4, 24, None, 8, 4, 2, 0, True),  # windows
    ],
)
def test_shapes_of_models(
    poisoned: None,
    side: int,
    channels: int,
    groups: int | None,
    states: int,
    windows: int,
    around: int,
    class_token: int,
    reverse: bool,
) -> None:
    args = inputs(
        side,
        channels,
        groups,
        batch=2 * windows,
        states=states,
        windows=windows,
        around=around,
        class_token=class_token,
        reverse=reverse,
    )
    _assert_like_the_definition(args)


@DIRECTIONS
@pytest.mark.parametrize(
    ("channels", "groups"), [(1, None), (19, 1), (6, 2), (160, 1), (160, 2), (24, 8)]
)
def test_any_channels(poisoned: None, channels: int, groups: int | None, reverse: bool) -> None:
    """Parts of a vector, several slabs, groups smaller and larger than a slab."""
    _assert_like_the_definition(inputs(5, channels, groups, reverse=reverse))


@DIRECTIONS
@pytest.mark.parametrize("side", [1, 4, 5])
def test_any_length(poisoned: None, side: int, reverse: bool) -> None:
    """Less than a tile of tokens, a tile, and several, one of which is short."""
    _assert_like_the_definition(inputs(side, 9, batch=2, reverse=reverse))


@DIRECTIONS
def test_windows_and_what_is_missing(poisoned: None, reverse: bool) -> None:
    args = with_missing(inputs(6, 19, windows=3, batch=5, class_token=1, reverse=reverse))
    _assert_like_the_definition(args)
    assert op(*args)[:, ::4].eq(0).all()
    args[6] = torch.full_like(args[6], -1)
    assert all(found.eq(0).all() for found in (op(*args), *backward(_gradient(args), *args)))


def test_anchors_and_neighbours_in_any_number(poisoned: None) -> None:
    """Anchors that share a token, a token twice in a patch, no neighbours at all."""
    args = inputs(5, 19, batch=2)
    made = torch.Generator().manual_seed(9)
    args[5] = torch.rand(2, 40, 7, generator=made)
    args[6] = torch.randint(-1, 25, (1, 40), generator=made)
    args[7] = torch.randint(-1, 25, (1, 40, 7), generator=made)
    _assert_like_the_definition(args)
    args[5], args[7] = args[5][..., :0], args[7][..., :0]
    assert all(found.eq(0).all() for found in (op(*args), *backward(_gradient(args), *args)))


def test_half_precision() -> None:
    args = inputs(5, 19)
    args[0] = args[0].bfloat16()
    for index in (1, 3, 4):
        args[index] = args[index].half()
    _assert_like_the_definition(args)


def test_any_strides() -> None:
    """A channel-major input, slices of a projection, a gradient of a sum."""
    args = inputs(5, 6, batch=2)
    args[0] = args[0].contiguous()
    args[1] = randn(20, 2, 25, 15)[..., 4:10].transpose(1, 2).abs() * 0.3
    args[2] = args[2].t().contiguous().t()
    args[3] = args[3].contiguous()
    args[4] = randn(21, 2, 25, 15)[..., 3:12].transpose(1, 2)
    args[5] = args[5].transpose(1, 2).contiguous().transpose(1, 2)
    _assert_like_the_definition(args, torch.ones(1, 1, 1).expand(2, 25, 6))
    _assert_like_the_definition(args, randn(22, 2, 6, 25).transpose(1, 2))
    with record_launches() as recording:
        patched_scan(*args)
    assert recording.copies == ["u is copied: its channels are not next to each other in memory"]


def test_where_states_vanish() -> None:
    args = inputs(6, 9)
    args[1] = args[1] * 200  # decays from 1 down to what fp32 cannot hold
    _assert_like_the_definition(args)


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    args = with_missing(inputs(7, 160, 2, batch=3, windows=3))
    grad = _gradient(args)
    before, found = torch.get_num_threads(), []
    for count in (1, 2, 3, 3):
        torch.set_num_threads(count)
        found.append([patched_scan(*args), *patched_scan_backward(grad, *args)])
    torch.set_num_threads(before)
    for others in found[1:]:
        assert all(map(torch.equal, others, found[0]))


def test_a_sample_does_not_depend_on_the_batch() -> None:
    args = with_missing(inputs(7, 100, 2, batch=6, windows=3))
    grad = _gradient(args)
    together = [op(*args), *backward(grad, *args)]
    for sample in range(6):
        one, window = slice(sample, sample + 1), slice(sample % 3, sample % 3 + 1)
        alone = [arg[one] if index in (0, 1, 3, 4, 5) else arg for index, arg in enumerate(args)]
        alone[6:8] = args[6][window], args[7][window]
        found = [op(*alone), *backward(grad[one], *alone)]
        for ours, theirs in zip(found, together, strict=True):
            assert torch.equal(ours, theirs[one])


@DIRECTIONS
def test_opcheck(reverse: bool) -> None:
    args = with_missing(inputs(groups=2, windows=2, reverse=reverse))
    assert_opcheck(backward, (_gradient(args), *args))
    for index in DIFFERENTIABLE:
        args[index].requires_grad_()
    assert_opcheck(op, tuple(args))


@pytest.mark.parametrize("index", [6, 7])
def test_tokens_beyond_the_sequence_are_refused(index: int) -> None:
    args = inputs()
    args[index] = args[index].clone()
    args[index].view(-1)[4] = 9
    with pytest.raises(ValueError, match="must be tokens below L = 9, got 9"):
        op(*args)


@pytest.mark.parametrize(
    ("index", "dtype", "reason"),
    [
        (4, torch.bfloat16, "B and C, and u and z, must share a dtype"),
        (5, torch.bfloat16, r"weights must be fp32, got torch\.bfloat16"),
    ],
)
def test_other_dtypes_run_the_reference(index: int, dtype: torch.dtype, reason: str) -> None:
    args = inputs()
    args[index] = args[index].to(dtype)
    with pytest.warns(ReferenceWarning, match=f"patched_scan runs its reference: {reason}"):
        found = op(*args)
    assert_close(found.double(), patched_scan_ref(*double(args)), ROUNDING)
    with pytest.warns(ReferenceWarning, match="gradient and u must share a dtype"):
        backward(_gradient(args).half(), *inputs())


def test_double_runs_the_reference_and_says_so() -> None:
    args = double(inputs())
    with pytest.warns(ReferenceWarning, match=r"patched_scan .* got torch\.float64"):
        found = op(*args)
    assert_close(found, patched_scan_ref(*args), 1e-12)
