"""Gradients in C++ on the CPU against references in double (see tests/test_gradients.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import ouro_compiler.kernels.cpu  # noqa: F401  (registers the kernels)
from ouro_compiler.kernels.dispatch import ReferenceWarning
from ouro_compiler.ops.causal_conv1d import causal_conv1d_backward_ref
from ouro_compiler.ops.chunked_scan import selective_scan_backward
from tests.helpers import assert_close, assert_opcheck, randn

scan, scan_backward = torch.ops.ouro.selective_scan, torch.ops.ouro.selective_scan_backward
conv, conv_backward = torch.ops.ouro.causal_conv1d, torch.ops.ouro.causal_conv1d_backward

Args = tuple[Any, ...]
ROUNDING = 1e-5
DIRECTIONS = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
# A reference in the place of a kernel is a failure, but where its warning is expected.
pytestmark = pytest.mark.filterwarnings("error::ouro_compiler.kernels.dispatch.ReferenceWarning")


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def _token_major(seed: int, batch: int, channels: int, length: int) -> Tensor:
    return randn(seed, batch, length, channels).transpose(1, 2)


def _scan_args(
    channels: int = 6,
    length: int = 9,
    groups: int | None = None,
    *,
    batch: int = 2,
    states: int = 8,
    reverse: bool = False,
) -> list[Any]:
    """grad, u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse."""
    grouped = () if groups is None else (groups,)
    grad, u, delta, z = (_token_major(seed, batch, channels, length) for seed in (0, 1, 2, 7))
    A = -torch.rand(channels, states, generator=torch.Generator().manual_seed(3))
    B, C = (randn(seed, batch, *grouped, length, states).transpose(-1, -2) for seed in (4, 5))
    bias = randn(8, channels) * 0.5
    return [grad, u, delta * 0.5, A, B, C, randn(6, channels), z, bias, True, reverse]


def _conv_args(
    channels: int = 6, length: int = 9, taps: int = 4, *, silu: bool = True, reverse: bool = False
) -> list[Any]:
    """grad, x, weight, bias, silu, reverse."""
    grad, x = (_token_major(seed, 2, channels, length) for seed in (0, 1))
    return [grad, x, randn(2, channels, taps), randn(3, channels), silu, reverse]


def _double(args: list[Any]) -> list[Any]:
    return [arg.double() if isinstance(arg, Tensor) else arg for arg in args]


def _assert_like(reference: Callable[..., Args], op: Any, args: list[Any]) -> None:
    """Every gradient has its operand's shape and dtype, and the values of the double reference."""
    found, expected = op(*args), reference(*_double(args))
    assert len(found) == len(expected)
    for gradient, wanted, operand in zip(found, expected, args[1:], strict=False):
        if operand is None:
            assert gradient.numel() == 0
            continue
        assert gradient.dtype == operand.dtype
        assert_close(gradient.double(), wanted, max(ROUNDING, torch.finfo(operand.dtype).eps))


def _assert_scan(args: list[Any]) -> None:
    _assert_like(selective_scan_backward, scan_backward, args)


def _assert_conv(args: list[Any]) -> None:
    _assert_like(causal_conv1d_backward_ref, conv_backward, args)


# --- the scan's kernel


@DIRECTIONS
@pytest.mark.parametrize("length", [1, 9, 64, 65, 200])
def test_scan_of_any_length(poisoned: None, length: int, reverse: bool) -> None:
    """Less than a tile of time, a tile, and several, the first of which is short."""
    _assert_scan(_scan_args(length=length, reverse=reverse))


@DIRECTIONS
@pytest.mark.parametrize(
    ("channels", "groups"), [(1, None), (19, 1), (6, 2), (160, 1), (160, 2), (24, 8)]
)
def test_scan_of_any_channels(
    poisoned: None, channels: int, groups: int | None, reverse: bool
) -> None:
    """Parts of a vector, several slabs, groups smaller and larger than a slab."""
    _assert_scan(_scan_args(channels, 70, groups, reverse=reverse))


@pytest.mark.parametrize("states", [1, 5])
def test_scan_of_any_states(poisoned: None, states: int) -> None:
    """Fewer than are kept in registers at once, and a remainder."""
    _assert_scan(_scan_args(19, 67, 1, states=states))


@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("absent", [(6,), (7,), (8,), (6, 7, 8)], ids=str)
def test_scan_without_an_operand(poisoned: None, absent: tuple[int, ...], softplus: bool) -> None:
    args = _scan_args(19, 67)
    for index in absent:
        args[index] = None
    if not softplus:
        args[2] = args[2].abs()
        args[8] = None if args[8] is None else args[8].abs()
    args[9] = softplus
    _assert_scan(args)


def test_scan_in_half_precision() -> None:
    """Computed in fp32 and rounded once; parameters' gradients, in fp32, are as exact as ever."""
    args = _scan_args(19, 67)
    for index in (0, 1, 7):
        args[index] = args[index].bfloat16()
    for index in (2, 4, 5):
        args[index] = args[index].half()
    _assert_scan(args)
    args[3], args[6], args[8] = args[3].half(), args[6].bfloat16(), args[8].bfloat16()
    _assert_scan(args)


def test_scan_of_any_strides() -> None:
    """What a projection's slices, a channel-major input and a sum's gradient look like."""
    args = _scan_args(6, 70)
    args[0] = torch.ones(1, 1, 1).expand(2, 6, 70)
    args[1] = args[1].contiguous()
    args[2] = randn(20, 2, 70, 15)[..., 4:10].transpose(1, 2)
    args[3] = args[3].t().contiguous().t()
    args[4] = args[4].contiguous()
    args[5] = randn(21, 2, 70, 20)[..., 3:11].transpose(1, 2)
    args[6] = randn(22, 12)[::2]
    _assert_scan(args)


def test_scan_where_states_vanish_and_where_they_grow() -> None:
    args = _scan_args(9, 70)
    args[2] = args[2] * 60  # decays from 1 down to what fp32 cannot hold
    _assert_scan(args)
    args = _scan_args(9, 40)
    args[3] = -args[3] * 0.1
    _assert_scan(args)


def test_autograd_through_the_scan_and_the_convolution() -> None:
    """What training runs: both kernels behind their operators, each input with its gradient."""

    def gradients(args: list[Any], convolution: list[Any]) -> tuple[Tensor, ...]:
        leaves = [a.detach().requires_grad_() for a in (*args[1:9], *convolution[2:4])]
        u = conv(leaves[0], leaves[8], leaves[9], True, False)
        return torch.autograd.grad(scan(u, *leaves[1:8], True, False), leaves, args[0])

    args, convolution = _scan_args(19, 67), _conv_args(19, 67)
    found = gradients(args, convolution)
    with pytest.warns(ReferenceWarning):
        expected = gradients(_double(args), _double(convolution))
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours.double(), theirs, ROUNDING)


# --- the convolution's kernel


@DIRECTIONS
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(("length", "channels"), [(1, 6), (3, 19), (70, 40)])
def test_convolution(poisoned: None, length: int, channels: int, silu: bool, reverse: bool) -> None:
    """Sequences shorter than the filter included; with and without a bias."""
    args = _conv_args(channels, length, silu=silu, reverse=reverse)
    _assert_conv(args)
    args[3] = None
    _assert_conv(args)


def test_convolution_of_one_tap(poisoned: None) -> None:
    _assert_conv(_conv_args(9, 12, 1))


def test_convolution_in_half_precision() -> None:
    args = _conv_args(19, 67)
    args[:2] = [args[0].bfloat16(), args[1].bfloat16()]
    _assert_conv(args)
    args[2:4] = [args[2].half(), args[3].bfloat16()]
    _assert_conv(args)


def test_convolution_of_any_strides() -> None:
    args = _conv_args(6, 20)
    args[0] = torch.ones(1, 1, 1).expand(2, 6, 20)
    args[1] = randn(20, 2, 20, 15)[..., 4:10].transpose(1, 2)
    args[2] = args[2].t().contiguous().t()
    args[3] = randn(22, 12)[::2]
    _assert_conv(args)


# --- contracts


@pytest.mark.parametrize(
    ("op", "args"),
    [(scan_backward, _scan_args(160, 70, 2, batch=3)), (conv_backward, _conv_args(160, 70))],
    ids=["scan", "convolution"],
)
def test_bits_do_not_depend_on_the_number_of_threads(
    threads: Callable[[int], None], op: Any, args: list[Any]
) -> None:
    threads(1)
    expected = op(*args)
    for count in (2, 3, 5):
        threads(count)
        for _ in range(3):
            for ours, theirs in zip(op(*args), expected, strict=True):
                assert torch.equal(ours, theirs), count


def test_a_samples_gradients_do_not_depend_on_the_batch() -> None:
    """Those that are a sample's own: of u, delta, B, C and z."""
    args = _scan_args(160, 70, 2, batch=3)
    together = scan_backward(*args)
    for sample in range(3):
        one = slice(sample, sample + 1)
        alone = scan_backward(
            *(arg[one] if index in (0, 1, 2, 4, 5, 7) else arg for index, arg in enumerate(args))
        )
        for index in (0, 1, 3, 4, 6):
            assert torch.equal(together[index][one], alone[index])


@DIRECTIONS
def test_opcheck(reverse: bool) -> None:
    """Schemas, fakes and autograd, with the kernels in place."""
    args = _scan_args(6, 5, 2, reverse=reverse)
    assert_opcheck(scan_backward, tuple(args))
    assert_opcheck(scan_backward, (*args[:6], None, None, None, *args[9:]))
    convolution = _conv_args(6, 5, reverse=reverse)
    assert_opcheck(conv_backward, tuple(convolution))
    assert_opcheck(conv_backward, (*convolution[:3], None, *convolution[4:]))
    leaves = [a.requires_grad_() if isinstance(a, Tensor) else a for a in convolution[1:]]
    assert_opcheck(conv, tuple(leaves))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({0: torch.bfloat16}, "the output's gradient and u must share a dtype"),
        ({4: torch.bfloat16}, "B and C, and u and z, must share a dtype"),
    ],
)
def test_other_dtypes_run_the_reference(changed: dict[int, torch.dtype], reason: str) -> None:
    args = _scan_args()
    for index, dtype in changed.items():
        args[index] = args[index].to(dtype)
    with pytest.warns(ReferenceWarning, match=f"selective_scan_backward .*: {reason}"):
        found = scan_backward(*args)
    for ours, theirs in zip(found, selective_scan_backward(*args), strict=True):
        assert torch.equal(ours, theirs)


def test_filters_too_long_for_the_registers_run_the_reference() -> None:
    args = _conv_args(taps=17)
    with pytest.warns(ReferenceWarning, match="filters of 1 to 16 taps, got 17"):
        _assert_conv(args)


def test_double_runs_the_reference_and_says_so() -> None:
    scan_args, conv_args = _double(_scan_args()), _double(_conv_args())
    with pytest.warns(ReferenceWarning, match=r"selective_scan_backward .* got torch\.float64"):
        found = scan_backward(*scan_args)
    for ours, theirs in zip(found, selective_scan_backward(*scan_args), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.warns(ReferenceWarning, match=r"causal_conv1d_backward .* got torch\.float64"):
        conv_backward(*conv_args)
