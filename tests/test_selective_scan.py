"""selective_scan, its definition and its chunked form, against mamba_ssm's own reference."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import ouro_compiler.ops  # noqa: F401  (registers torch.ops.ouro)
from ouro_compiler.ops import chunked_scan
from ouro_compiler.ops import selective_scan as module
from tests.helpers import (
    assert_batch_invariant,
    assert_close,
    assert_opcheck,
    assert_token_major,
    mamba_selective_scan_ref,
    randn,
    shares_memory,
)

op = torch.ops.ouro.selective_scan
BATCH, CHANNELS = 2, 6
ROUNDING = 1e-5  # fp32, in another order of summation
TENSORS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
IN_TIME = ("u", "delta", "B", "C", "z")
HALF_PRECISION_LIKE_MAMBA = ("u", "delta", "B", "C", "z")
FORMS = pytest.mark.parametrize("form", [op, module.selective_scan_ref], ids=["op", "reference"])
DIRECTIONS = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
# B and C without a group dimension, or with this many groups.
GROUPS = pytest.mark.parametrize("groups", [None, 1, 2], ids=["flat", "G1", "G2"])


def _inputs(
    groups: int | None = None, *, states: int = 8, length: int = 9, seed: int = 0
) -> dict[str, Any]:
    """Every operand, of a size at which each one matters in the result."""
    grouped = () if groups is None else (groups,)
    return {
        "u": randn(seed, BATCH, CHANNELS, length),
        "delta": randn(seed + 1, BATCH, CHANNELS, length) * 0.5,
        "A": -torch.rand(CHANNELS, states, generator=torch.Generator().manual_seed(seed + 2)),
        "B": randn(seed + 3, BATCH, *grouped, states, length),
        "C": randn(seed + 4, BATCH, *grouped, states, length),
        "D": randn(seed + 5, CHANNELS),
        "z": randn(seed + 6, BATCH, CHANNELS, length),
        "delta_bias": randn(seed + 7, CHANNELS) * 0.5,
        "delta_softplus": True,
    }


def _mamba(inputs: dict[str, Any], reverse: bool = False) -> Tensor:
    """mamba's reference in fp32, on flipped time for a reversed scan; in u's dtype."""
    given = {k: v.float() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    if reverse:
        given.update({k: given[k].flip(-1) for k in IN_TIME if given[k] is not None})
    y = mamba_selective_scan_ref()(**given)
    return (y.flip(-1) if reverse else y).to(inputs["u"].dtype)


# --- the helper that fetches mamba's reference


def test_mambas_reference_is_its_own_and_leaves_no_stub_behind() -> None:
    """The function comes from the installed file, and sys.modules is as it was."""
    before = {name: sys.modules.get(name) for name in ("mamba_ssm", "selective_scan_cuda")}
    found = mamba_selective_scan_ref.__wrapped__()
    assert found.__module__ == "mamba_ssm.ops.selective_scan_interface"
    assert found.__code__.co_filename.endswith("selective_scan_interface.py")
    assert {name: sys.modules.get(name) for name in before} == before
    assert not any(
        name.startswith("mamba_ssm.") and before["mamba_ssm"] is None for name in sys.modules
    )


def test_a_missing_mamba_fails_and_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    with pytest.raises(pytest.fail.Exception, match=r"pip install .* mamba-ssm==2\.3\.2\.post1"):
        mamba_selective_scan_ref.__wrapped__()


# --- values


@FORMS
@GROUPS
@DIRECTIONS
@pytest.mark.parametrize(
    ("with_d", "with_z", "with_bias", "softplus"),
    list(itertools.product([False, True], repeat=4)),
)
def test_equals_mamba(
    form: Callable[..., Tensor],
    groups: int | None,
    reverse: bool,
    with_d: bool,
    with_z: bool,
    with_bias: bool,
    softplus: bool,
) -> None:
    """Every subset of the optional operands, every grouping, both directions."""
    inputs = _inputs(groups)
    if not softplus:  # keep the decay below one, as a softplus does
        inputs["delta"] = inputs["delta"].abs()
        inputs["delta_bias"] = inputs["delta_bias"].abs()
    absent = {"D": with_d, "z": with_z, "delta_bias": with_bias}
    inputs.update({name: None for name, present in absent.items() if not present})
    inputs["delta_softplus"] = softplus
    y = form(**inputs, reverse=reverse)
    assert_close(y, _mamba(inputs, reverse), ROUNDING)
    assert not any(shares_memory(y, v) for v in inputs.values() if isinstance(v, Tensor))


@FORMS
@DIRECTIONS
@pytest.mark.parametrize("states", [1, 8, 16])
@pytest.mark.parametrize("length", [1, 9, 50])
def test_sizes(form: Callable[..., Tensor], states: int, length: int, reverse: bool) -> None:
    inputs = _inputs(2, states=states, length=length)
    assert_close(form(**inputs, reverse=reverse), _mamba(inputs, reverse), ROUNDING)


@FORMS
@DIRECTIONS
@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs(
    form: Callable[..., Tensor], dtype: torch.dtype, groups: int | None, reverse: bool
) -> None:
    """Parameters stay fp32, as in mamba; the arithmetic is fp32 and the result rounded once."""
    inputs = _inputs(groups)
    inputs.update({name: inputs[name].to(dtype) for name in HALF_PRECISION_LIKE_MAMBA})
    y = form(**inputs, reverse=reverse)
    assert_close(y, _mamba(inputs, reverse), torch.finfo(dtype).eps)


@FORMS
def test_the_dtype_is_that_of_u(form: Callable[..., Tensor]) -> None:
    """Whatever the others have."""
    inputs = _inputs()
    inputs.update({name: inputs[name].bfloat16() for name in ("delta", "z", "A", "D")})
    y = form(**inputs)
    assert_close(y, _mamba(inputs), ROUNDING)
    assert y.dtype == torch.float32


@FORMS
def test_reverse_is_flip_scan_flip(form: Callable[..., Tensor]) -> None:
    """Against the op itself rather than mamba."""
    inputs = _inputs(2)
    flipped = {k: v.flip(-1) if k in IN_TIME else v for k, v in inputs.items()}
    assert_close(form(**inputs, reverse=True), form(**flipped).flip(-1), ROUNDING)


def test_positional_arguments_and_defaults() -> None:
    """The schema's order is mamba's, and `reverse` follows `delta_softplus`."""
    inputs = _inputs()
    positional = [inputs[name] for name in TENSORS]
    assert torch.equal(op(*positional, True, True), op(**inputs, reverse=True))
    assert torch.equal(op(*positional[:5]), op(*positional[:5], None, None, None, False, False))


@DIRECTIONS
@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("steps", [1, 2, 4, 8, 9, 100])
def test_chunks_change_nothing(
    monkeypatch: pytest.MonkeyPatch, steps: int, groups: int | None, reverse: bool
) -> None:
    """Chunks of one step, of a divisor of L, of no divisor, and of more than all of L = 9."""
    inputs = _inputs(groups)
    expected = module.selective_scan_ref(**inputs, reverse=reverse)
    per_step = BATCH * inputs["A"].numel()
    monkeypatch.setattr(chunked_scan, "_CHUNK_ELEMENTS", steps * per_step)
    assert_close(chunked_scan.selective_scan_chunked(**inputs, reverse=reverse), expected, ROUNDING)
    assert torch.equal(
        module.selective_scan_implementation(**inputs, reverse=reverse),
        chunked_scan.selective_scan_chunked(**inputs, reverse=reverse),
    )


@DIRECTIONS
def test_a_chunk_has_at_least_one_step(monkeypatch: pytest.MonkeyPatch, reverse: bool) -> None:
    """A budget smaller than one step's states is overdrawn, not divided to zero."""
    inputs = _inputs()
    monkeypatch.setattr(chunked_scan, "_CHUNK_ELEMENTS", 1)
    expected = module.selective_scan_ref(**inputs, reverse=reverse)
    assert_close(op(**inputs, reverse=reverse), expected, ROUNDING)


def test_inputs_in_any_memory_layout() -> None:
    """Token-major activations, as they come from a linear layer, give the same values."""
    inputs = _inputs(2)
    strided = dict(inputs)
    for name in ("u", "delta", "z"):
        strided[name] = inputs[name].transpose(1, 2).contiguous().transpose(1, 2)
    for name in ("B", "C"):
        strided[name] = inputs[name].permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
    strided["A"] = inputs["A"].t().contiguous().t()
    for form in (op, module.selective_scan_ref):
        assert_close(form(**strided), form(**inputs), ROUNDING)


@FORMS
@DIRECTIONS
@pytest.mark.parametrize("token_major_inputs", [False, True])
@pytest.mark.parametrize("with_z", [False, True])
def test_memory_is_token_major(
    form: Callable[..., Tensor], with_z: bool, token_major_inputs: bool, reverse: bool
) -> None:
    """Of the real result and of the fake one, however the inputs lie."""
    inputs = _inputs()
    if not with_z:
        inputs["z"] = None
    if token_major_inputs:
        inputs["u"] = inputs["u"].transpose(1, 2).contiguous().transpose(1, 2)
    assert_token_major(form(**inputs, reverse=reverse))
    with FakeTensorMode() as mode:
        fakes = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in inputs.items()}
        assert_token_major(op(**fakes, reverse=reverse))


# --- gradients


def _gradients(
    function: Callable[[dict[str, Any]], Tensor], inputs: dict[str, Any], wanted: tuple[str, ...]
) -> dict[str, Tensor]:
    leaves = {
        k: v.detach().clone().requires_grad_(k in wanted) if isinstance(v, Tensor) else v
        for k, v in inputs.items()
    }
    y = function(leaves)
    (y * randn(99, *y.shape).to(y.dtype)).sum().backward()
    return {name: leaves[name].grad for name in TENSORS if isinstance(leaves[name], Tensor)}


def _assert_gradients_match(
    inputs: dict[str, Any],
    reverse: bool,
    wanted: tuple[str, ...] = TENSORS,
    tolerance: float = ROUNDING,
) -> None:
    ours = _gradients(lambda given: op(**given, reverse=reverse), inputs, wanted)
    theirs = _gradients(lambda given: _mamba(given, reverse), inputs, wanted)
    for name, expected in theirs.items():
        if name in wanted:
            assert_close(ours[name], expected, tolerance)
        else:
            assert ours[name] is None, name


@DIRECTIONS
@GROUPS
@pytest.mark.parametrize("softplus", [False, True])
def test_gradients(groups: int | None, softplus: bool, reverse: bool) -> None:
    """Of all eight operands, against autograd through mamba's reference."""
    inputs = _inputs(groups)
    inputs["delta_softplus"] = softplus
    if not softplus:
        inputs["delta"] = inputs["delta"].abs()
        inputs["delta_bias"] = inputs["delta_bias"].abs()
    _assert_gradients_match(inputs, reverse)


@DIRECTIONS
@pytest.mark.parametrize("absent", ["D", "z", "delta_bias"])
def test_gradients_without_an_operand(absent: str, reverse: bool) -> None:
    inputs = _inputs(2)
    inputs[absent] = None
    _assert_gradients_match(inputs, reverse, tuple(n for n in TENSORS if n != absent))


@pytest.mark.parametrize("wanted", TENSORS)
def test_gradient_of_one_operand_alone(wanted: str) -> None:
    """The others get none."""
    _assert_gradients_match(_inputs(), False, (wanted,))


@DIRECTIONS
@pytest.mark.parametrize("steps", [1, 4, 8])
@pytest.mark.parametrize("states", [1, 8])
def test_gradients_across_chunks(
    monkeypatch: pytest.MonkeyPatch, states: int, steps: int, reverse: bool
) -> None:
    """The state at a chunk's entry and the gradient at its exit are handed on."""
    inputs = _inputs(2, states=states)
    monkeypatch.setattr(chunked_scan, "_CHUNK_ELEMENTS", steps * BATCH * inputs["A"].numel())
    _assert_gradients_match(inputs, reverse)


@pytest.mark.parametrize("length", [1, 50])
def test_gradients_of_short_and_long_sequences(length: int) -> None:
    for reverse in (False, True):
        _assert_gradients_match(_inputs(length=length), reverse)


@DIRECTIONS
def test_gradients_in_half_precision(reverse: bool) -> None:
    """Each gradient has its operand's dtype, rounded from an fp32 computation."""
    inputs = _inputs()
    inputs.update({name: inputs[name].bfloat16() for name in HALF_PRECISION_LIKE_MAMBA})
    _assert_gradients_match(inputs, reverse, tolerance=torch.finfo(torch.bfloat16).eps)


def test_gradients_of_the_reference_are_those_of_the_op() -> None:
    """Autograd through the definition, both directions."""
    inputs = _inputs(2)
    for reverse in (False, True):

        def reference(given: dict[str, Any], reverse: bool = reverse) -> Tensor:
            return module.selective_scan_ref(**given, reverse=reverse)

        def ours(given: dict[str, Any], reverse: bool = reverse) -> Tensor:
            return op(**given, reverse=reverse)

        expected, found = (_gradients(f, inputs, TENSORS) for f in (reference, ours))
        for name in TENSORS:
            assert_close(found[name], expected[name], ROUNDING)


# --- contracts


@DIRECTIONS
def test_batch_invariance(monkeypatch: pytest.MonkeyPatch, reverse: bool) -> None:
    """Without softplus and gate: bit for bit, though chunks are longer in a smaller batch."""
    channels, states, length = 13, 5, 9
    monkeypatch.setattr(chunked_scan, "_CHUNK_ELEMENTS", 2 * 5 * channels * states)
    A = -torch.rand(channels, states, generator=torch.Generator().manual_seed(0))
    D = randn(1, channels)
    batched = [randn(seed, 5, channels, length) for seed in (2, 3)]
    batched += [randn(seed, 5, states, length) for seed in (4, 5)]
    for form in (op, module.selective_scan_ref):
        assert_batch_invariant(
            lambda u, delta, B, C, form=form: form(
                u, delta.abs(), A, B, C, D, None, D.abs(), False, reverse
            ),
            *batched,
        )


@pytest.mark.parametrize(("softplus", "gated"), [(True, False), (False, True)])
def test_batch_invariance_of_softplus_and_gate(softplus: bool, gated: bool) -> None:
    channels, states, length = 13, 5, 9
    A = -torch.rand(channels, states, generator=torch.Generator().manual_seed(0))
    u, delta, z = (randn(seed, 31, channels, length) for seed in (2, 3, 6))
    B, C = (randn(seed, 31, states, length) for seed in (4, 5))
    assert_batch_invariant(
        lambda u, delta, B, C, z: op(u, delta, A, B, C, None, z, None, softplus, False),
        u,
        delta.abs(),
        B,
        C,
        z if gated else None,
    )


def _resized(name: str, *shape: int) -> tuple[str, Tensor]:
    return name, torch.zeros(shape)


@FORMS
@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        (_resized("delta", 2, 6, 8), r"u, delta and z must share one shape \(B, D, L\)"),
        (_resized("z", 2, 5, 9), r"u, delta and z must share one shape \(B, D, L\)"),
        (_resized("u", 6, 9), r"u, delta and z must share one shape \(B, D, L\)"),
        (_resized("A", 5, 8), r"A must be real, of shape \(D, N\), got \(5, 8\) for D = 6"),
        (_resized("A", 6), r"A must be real, of shape \(D, N\), got \(6,\)"),
        (_resized("B", 2, 7, 9), r"B must be \(B, N, L\) or \(B, G, N, L\), got \(2, 7, 9\)"),
        (_resized("C", 2, 1, 7, 9), r"C must be \(B, N, L\) or \(B, G, N, L\)"),
        (_resized("B", 8, 9), r"B must be \(B, N, L\) or \(B, G, N, L\), got \(8, 9\)"),
        (_resized("B", 2, 4, 8, 9), "B and C need the same number of groups, a divisor of D = 6"),
        (_resized("C", 2, 4, 8, 9), "B and C need the same number of groups, a divisor of D = 6"),
        (_resized("D", 5), r"D must have shape \(D,\), got \(5,\)"),
        (_resized("D", 1), r"D must have shape \(D,\), got \(1,\)"),
        (_resized("delta_bias", 6, 1), r"delta_bias must have shape \(D,\), got \(6, 1\)"),
    ],
)
def test_refuses_other_shapes(
    form: Callable[..., Tensor], changed: tuple[str, Tensor], sentence: str
) -> None:
    with pytest.raises(ValueError, match=f"^ouro::selective_scan: {sentence}"):
        form(**{**_inputs(), changed[0]: changed[1]})


@FORMS
def test_refuses_a_complex_transition(form: Callable[..., Tensor]) -> None:
    """mamba_ssm has a complex mode; this op has none."""
    inputs = _inputs()
    inputs["A"] = inputs["A"].to(torch.complex64)
    with pytest.raises(ValueError, match="selective_scan: A must be real"):
        form(**inputs)


@FORMS
@pytest.mark.parametrize("shape", [(2, 8, 1), (2, 8, 8), (2, 8, 18), (1, 8, 9), (3, 8, 9)])
def test_refuses_another_length_or_batch_of_b(
    form: Callable[..., Tensor], shape: tuple[int, ...]
) -> None:
    inputs = _inputs()
    inputs["B"] = torch.zeros(shape)
    with pytest.raises(ValueError, match=r"^ouro::selective_scan: "):
        form(**inputs)


@FORMS
@pytest.mark.parametrize("grouped", ["B", "C"])
def test_refuses_b_and_c_grouped_differently(form: Callable[..., Tensor], grouped: str) -> None:
    flat, inputs = _inputs(), _inputs(2)
    inputs["C" if grouped == "B" else "B"] = flat["C" if grouped == "B" else "B"]
    with pytest.raises(ValueError, match="the same number of groups"):
        form(**inputs)


@pytest.mark.parametrize(
    ("groups", "absent", "reverse"),
    [(None, (), False), (2, ("D", "z", "delta_bias"), True), (1, ("D",), False)],
)
def test_opcheck(groups: int | None, absent: tuple[str, ...], reverse: bool) -> None:
    inputs = _inputs(groups, length=5)
    inputs.update(dict.fromkeys(absent))
    tensors = [inputs[name] for name in TENSORS]
    args = [t if t is None else t.requires_grad_() for t in tensors]
    assert_opcheck(op, (*args, True, reverse))


def test_opcheck_of_the_backward() -> None:
    """Its outputs' dtypes, shapes and strides are the fake's; absent operands give empty ones."""
    inputs = _inputs(2, length=5)
    tensors = [inputs[name] for name in TENSORS]
    grad = randn(50, BATCH, CHANNELS, 5)
    backward = torch.ops.ouro.selective_scan_backward
    assert_opcheck(backward, (grad, *tensors, True, True))
    assert_opcheck(backward, (grad, *tensors[:5], None, None, None, False, False))


def test_opcheck_of_the_backward_with_a_transposed_a() -> None:
    inputs = _inputs(length=5)
    inputs["A"] = inputs["A"].t().contiguous().t()
    tensors = [inputs[name] for name in TENSORS]
    grad = randn(50, BATCH, CHANNELS, 5)
    assert_opcheck(torch.ops.ouro.selective_scan_backward, (grad, *tensors, True, False))
