"""pack_int4 and unpack_int4: two 4-bit codes a byte, in K-halves (T12)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import ouro_compiler.ops  # noqa: F401  (registers torch.ops.ouro)
from tests.helpers import REPEATABLE, assert_opcheck, generator

pack = torch.ops.ouro.pack_int4
unpack = torch.ops.ouro.unpack_int4


def _codes(seed: int, *shape: int) -> Tensor:
    return torch.randint(-8, 8, shape, dtype=torch.int8, generator=generator(seed))


def _pack_by_hand(row: list[int]) -> list[int]:
    """Byte j: code j in the low nibble, code j + ceil(K/2) in the high one, two's complement."""
    half = (len(row) + 1) // 2
    padded = row + [0] * (2 * half - len(row))
    return [(padded[j] % 16) + 16 * (padded[j + half] % 16) for j in range(half)]


def test_bytes_of_a_row_are_as_documented() -> None:
    """K = 4: byte 0 holds codes 0 and 2, byte 1 codes 1 and 3."""
    packed = pack(torch.tensor([[1, -1, -8, 7]], dtype=torch.int8))
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [[0x81, 0x7F]]


def test_bytes_of_an_odd_row_are_as_documented() -> None:
    """K = 5: halves are 3 and 2 codes, and the last high nibble is zero."""
    packed = pack(torch.tensor([1, 2, -3, 4, -5], dtype=torch.int8))
    assert packed.tolist() == [0x41, 0xB2, 0x0D]
    assert unpack(packed, 5).tolist() == [1, 2, -3, 4, -5]


def test_every_pair_of_nibbles_round_trips() -> None:
    """All 16 x 16 (low, high) pairs, the 15 x 15 symmetric ones among them; high sign kept."""
    values = torch.arange(-8, 8, dtype=torch.int8)
    pairs = torch.cartesian_prod(values, values)
    packed = pack(pairs)
    assert packed.shape == (256, 1)
    assert sorted(packed.flatten().tolist()) == list(range(256))
    assert torch.equal(unpack(packed, 2), pairs)


@REPEATABLE
@given(
    leading=st.lists(st.integers(1, 3), max_size=3), k=st.integers(1, 40), seed=st.integers(0, 999)
)
def test_round_trip(leading: list[int], k: int, seed: int) -> None:
    """Any leading dimensions, any K >= 1: the layout by hand, and back."""
    codes = _codes(seed, *leading, k)
    packed = pack(codes)
    assert packed.shape == (*leading, (k + 1) // 2)
    rows = codes.reshape(-1, k).tolist()
    assert packed.reshape(len(rows), -1).tolist() == [_pack_by_hand(row) for row in rows]
    back = unpack(packed, k)
    assert back.dtype == torch.int8
    assert torch.equal(back, codes)


@REPEATABLE
@given(half=st.integers(1, 20), seed=st.integers(0, 999))
def test_any_bytes_survive_unpack_then_pack(half: int, seed: int) -> None:
    """Packing is onto: no byte is out of reach at an even K."""
    data = np.random.default_rng(seed).integers(0, 256, (2, half), dtype=np.uint8)
    packed = torch.from_numpy(data)
    assert torch.equal(pack(unpack(packed, 2 * half)), packed)


@pytest.mark.parametrize("k", [4, 5])
def test_a_strided_input_packs_like_its_copy(k: int) -> None:
    """Values do not depend on how the input lies in memory."""
    codes = _codes(0, k, 6).t()
    assert torch.equal(pack(codes), pack(codes.contiguous()))
    packed = pack(codes.contiguous())
    strided = packed.t().contiguous().t()
    assert torch.equal(unpack(strided, k), codes)


def test_inputs_are_not_changed_or_returned() -> None:
    codes = _codes(1, 3, 8)
    kept = codes.clone()
    packed = pack(codes)
    assert torch.equal(codes, kept)
    assert packed.untyped_storage().data_ptr() != codes.untyped_storage().data_ptr()
    kept = packed.clone()
    unpack(packed, 8)
    assert torch.equal(packed, kept)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float32])
def test_pack_takes_int8_only(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="pack_int4: codes must be int8"):
        pack(torch.zeros(2, 4, dtype=dtype))


def test_unpack_takes_uint8_only() -> None:
    with pytest.raises(ValueError, match="unpack_int4: cannot take 4 codes"):
        unpack(torch.zeros(2, 2, dtype=torch.int8), 4)


@pytest.mark.parametrize("length", [2, 5, 6, 7])
def test_unpack_refuses_a_length_that_does_not_fit(length: int) -> None:
    """Two bytes hold three or four codes."""
    with pytest.raises(ValueError, match=f"unpack_int4: cannot take {length} codes"):
        unpack(torch.zeros(2, 2, dtype=torch.uint8), length)


@pytest.mark.parametrize("k", [1, 6, 7])
def test_opcheck(k: int) -> None:
    codes = _codes(2, 3, k)
    assert_opcheck(pack, (codes,))
    assert_opcheck(unpack, (pack(codes), k))


def test_opcheck_of_a_transposed_input() -> None:
    assert_opcheck(pack, (_codes(3, 6, 5).t(),))
