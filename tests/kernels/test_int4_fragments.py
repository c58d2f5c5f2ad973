"""Registers of m16n8k32 on bytes and of m16n8k64 on nibbles, by the formulas of the PTX ISA."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ouro_compiler.kernels.int4_matrix import use_nibbles
from ouro_compiler.ops.packing import pack_int4_ref

Integers = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint32]


def place_a(lane: int, element: int, width: int) -> tuple[int, int]:
    """(row, column) of an element of A that a lane holds; width: elements in a register.

    PTX ISA, "Matrix Fragments for mma.m16n8k32" (8-bit, width 4) and "mma.m16n8k64" (4-bit, 8).
    """
    group, thread = lane >> 2, lane % 4
    first = 0 <= element < width or 2 * width <= element < 3 * width
    column = thread * width + (element & (width - 1))
    return group if first else group + 8, column if element < 2 * width else column + 4 * width


def place_b(lane: int, element: int, width: int) -> tuple[int, int]:
    """(row, column) of an element of B that a lane holds."""
    group, thread = lane >> 2, lane % 4
    row = thread * width + (element & (width - 1))
    return row if element < width else row + 4 * width, group


def place_c(lane: int, element: int) -> tuple[int, int]:
    """(row, column) of a sum, in both."""
    return (lane >> 2) + (0 if element < 2 else 8), (lane % 4) * 2 + (element & 1)


def load_bytes(matrix: npt.NDArray[np.uint8], place: Any, registers: int) -> Words:
    """(32 lanes, registers): what lanes hold of a matrix of bytes for m16n8k32."""
    found = np.zeros((32, registers), np.uint32)
    for lane in range(32):
        for element in range(4 * registers):
            byte = np.uint32(matrix[place(lane, element, 4)])
            found[lane, element // 4] |= byte << np.uint32(8 * (element % 4))
    return found


def multiply_nibbles(a: Words, b: Words) -> Integers:
    """(16, 8): what mma.m16n8k64 of s4 makes of these registers."""
    left, right = np.zeros((16, 64), np.int64), np.zeros((64, 8), np.int64)
    for matrix, words, place in ((left, a, place_a), (right, b, place_b)):
        for lane in range(32):
            for element in range(8 * words.shape[1]):
                nibble = int(words[lane, element // 8]) >> 4 * (element % 8) & 15
                matrix[place(lane, element, 8)] = nibble - 16 * (nibble > 7)
    return left @ right


PAIR = "\touro.pair.s4 %r{0}, %r{1}, %r{2};\n"
BYTES = "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32"
PRODUCT = (
    "\t"
    + BYTES
    + " {{ %r90, %r91, %r92, %r93 }}, {{ {0} }}, {{ {1} }}, {{ %r94, %r95, %r96, %r97 }};\n"
)


def paired(low: Words, high: Words) -> Words:
    """What the instructions for `ouro.pair.s4` compute, read from the PTX."""
    product = PRODUCT.format("%r1, %r1, %r1, %r1", "%r4, %r5")
    text = use_nibbles(PAIR.format(1, 2, 3) + product).splitlines()[0]
    known = {"%r2": low, "%r3": high}
    for line in text.strip(" \t{}").split(";"):
        name, *operands = re.findall(r"[%.\w]+", line) or [""]
        values = [known[one] if one in known else _number(one) for one in operands[1:]]
        if name == "shl.b32":
            known[operands[0]] = values[0] << values[1]
        elif name == "lop3.b32":
            known[operands[0]] = _lop3(*values)
        else:
            assert name in ("", ".reg"), line
    return known["%r1"]


def _number(text: str) -> Any:
    return np.uint32(int(text, 0)) if re.match(r"\d", text) else None


def _lop3(a: Any, b: Any, c: Any, table: Any) -> Any:
    """PTX ISA: a bit of the result is the bit of the table that the three bits a, b, c number."""
    found = np.zeros_like(a)
    for number in range(8):
        if int(table) >> number & 1:
            bits = [one if number >> at & 1 else ~one for one, at in ((a, 2), (b, 1), (c, 0))]
            found |= bits[0] & bits[1] & bits[2]
    return found


def test_registers_of_bytes_are_registers_of_nibbles() -> None:
    """Codes of 16 rows, by packed weights of 8 outputs, K-halves of 64: the product of all K.

    Of codes that are no nibbles, which outliers' are, it is the product of their low nibbles.
    """
    random = np.random.default_rng(0)
    codes = random.integers(-8, 8, (16, 128)).astype(np.int8)
    codes[:, ::5] = random.integers(-128, 128, codes[:, ::5].shape)
    weight = random.integers(-8, 8, (8, 128)).astype(np.int8)
    packed = pack_int4_ref(torch.from_numpy(weight)).numpy()
    low, high = (np.ascontiguousarray(half).view(np.uint32) for half in np.split(codes, 2, axis=1))
    a = paired(low, high).view(np.uint8)
    found = np.zeros((16, 8), np.int64)
    for first in (0, 32):
        k = slice(first, first + 32)
        found += multiply_nibbles(
            load_bytes(a[:, k], place_a, 4), load_bytes(packed[:, k].T, place_b, 2)
        )
    nibbles = (codes.astype(np.int64) + 8) % 16 - 8
    assert (nibbles != codes).any()
    assert np.array_equal(found, nibbles @ weight.astype(np.int64).T)


def test_places_are_all_of_a_matrix_once() -> None:
    for width, elements, place, count in (
        *((4, 16, place_a, 16 * 32), (8, 32, place_a, 16 * 64)),
        *((4, 8, place_b, 32 * 8), (8, 16, place_b, 64 * 8)),
    ):
        found = {place(lane, one, width) for lane in range(32) for one in range(elements)}
        assert len(found) == count
    assert len({place_c(lane, one) for lane in range(32) for one in range(4)}) == 16 * 8
