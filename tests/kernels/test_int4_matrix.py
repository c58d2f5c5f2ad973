"""Products of nibbles: fragments as the PTX ISA has them, what is rewritten, what comes out."""

from __future__ import annotations

import re
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from benchmarks.offline import linear_case, other_direction, recorded
from ouro_compiler.kernels.cache import import_source, write_source
from ouro_compiler.kernels.candidates import as_choice, current_choice
from ouro_compiler.kernels.codegen import generate, kernel_name
from ouro_compiler.kernels.grouping import join
from ouro_compiler.kernels.int4_matrix import NibbleKernel, use_nibbles
from ouro_compiler.kernels.launch import Launch
from ouro_compiler.kernels.offline import Resources, _driver_for, compile_ahead
from ouro_compiler.kernels.retile import retile
from ouro_compiler.ops.packing import pack_int4_ref

pytestmark = pytest.mark.usefixtures("empty_caches")
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


FOUR = "".join(PAIR.format(number, number + 10, number + 20) for number in range(4))
A, B = "%r0, %r1, %r2, %r3", "%r50, %r51"


def test_only_products_of_pairs_are_rewritten() -> None:
    other = PRODUCT.format("%r60, %r61, %r62, %r63", B)
    found = use_nibbles(FOUR + PRODUCT.format(A, B) + other)
    assert found.endswith(other)
    nibbles = "mma.sync.aligned.m16n8k64.row.col.satfinite.s32.s4.s4.s32"
    assert PRODUCT.format(A, B).replace(BYTES, nibbles) in found
    assert "ouro" not in found
    plain = use_nibbles(FOUR + PRODUCT.format(A, B).replace(".satfinite", ""))
    assert nibbles.replace(".satfinite", "") in plain
    assert use_nibbles(other) == other


@pytest.mark.parametrize(
    ("ptx", "words"),
    [
        (FOUR, "4 of 4 registers of nibbles"),
        (FOUR + PRODUCT.format("%r0, %r1, %r2, %r60", B), "bytes and nibbles"),
        (FOUR + PRODUCT.format(A, "%r0, %r51"), "1 of 4 registers"),
        (FOUR + PRODUCT.format(A, B) + "\tmov.b32 %r70, %r2;\n", "1 of 4 registers"),
        (FOUR + PRODUCT.format(A, B).replace("k32", "k16"), "4 of 4 registers"),
        (FOUR + FOUR + PRODUCT.format(A, B), "8 of 8 registers"),
    ],
)
def test_what_is_not_understood_is_refused(ptx: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        use_nibbles(ptx)


def forms(inputs: int, outputs: int, **options: Any) -> tuple[Launch, Launch]:
    """A product by default, and on INT4 tensor cores; options: blocks of both, or of the case."""
    blocks = {name: options.pop(name) for name in list(options) if name.isupper()}
    case = {"packed": True, "outlier_bits": 8, **options}
    (one,) = recorded(lambda: linear_case(inputs, outputs, **case))
    default = {**dict(current_choice(one.spec)), **blocks}
    plain, nibbles = (retile(one, as_choice({**default, "MATRIX_BITS": bits})) for bits in (8, 4))
    return plain, nibbles


def compiled(launch: Launch, arch: int, folder: Path) -> tuple[Resources, str]:
    """What a launch takes, and its PTX."""
    import triton

    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(folder / f"{arch}_{launch.spec.digest}")
        found = compile_ahead(launch, arch)
        (path,) = Path(triton.knobs.cache.dir).rglob("*.ptx")
        return found, path.read_text()


@pytest.mark.parametrize(
    ("shape", "arch", "options"),
    [
        ((768, 3072), 80, {}),
        ((1536, 80), 89, {"activation": "softplus"}),
        ((100, 44), 80, {"activation": "silu", "residual": True, "dtype": torch.float32}),
    ],
)
def test_products_of_nibbles_are_compiled(
    shape: tuple[int, int], arch: int, options: dict[str, Any], tmp_path: Path
) -> None:
    """Half the matrix instructions in the loop, no spills, and one epilogue.

    What is fused there, and with what, is the same: so are the bits.
    """
    (plain, before), (nibbles, after) = (
        compiled(one, arch, tmp_path) for one in forms(*shape, **options)
    )
    assert (nibbles.spills, nibbles.stack_bytes) == (0, 0)
    assert nibbles.registers <= 232
    assert nibbles.shared_bytes <= plain.shared_bytes
    assert nibbles.matrix == "mma.sync.aligned.m16n8k64.row.col.satfinite.s32.s4.s4.s32"
    assert set(plain.machine_matrix) == {S8}
    assert set(nibbles.machine_matrix) == {S8, S4}
    if shape[0] > 128:  # a loop, not one step
        listed = nibbles.machine_matrix[S8] // 2  # by codes, and by their low nibbles
        assert plain.machine_matrix[S8] - listed == 2 * nibbles.machine_matrix[S4]
        assert nibbles.loops[-2] < plain.loops[-2]
    assert multiplications(after) == multiplications(before)
    assert any(one[0] == "fma.rn.f32" for one in multiplications(after))


S8, S4 = "IMMA.16832.S8.S8.SAT", "IMMA.16864.S4.S4.SAT"


def multiplications(ptx: str) -> dict[tuple[str, ...], float]:
    """The share of each kind of multiplication, by what its factors and its term come from.

    Of sums of two products that says which one is rounded by itself: inlier scales, in fp16 here,
    and the results of other multiplications are told from the rest.
    """
    found = re.findall(r"^\t(?:@%p\d+ )?([a-z][\w.]+) +([^;]*);", ptx, re.MULTILINE)
    of = {operands.split(",")[0].strip(): name for name, operands in found}

    def kind(operand: str) -> str:
        name = of.get(operand.strip(), "number")
        return name if name.startswith(("cvt.f32.f16", "mul.f", "fma", "add.f")) else "other"

    kinds: Counter[tuple[str, ...]] = Counter()
    for name, operands in found:
        if name in ("mul.f32", "fma.rn.f32"):
            _, a, b, *term = operands.split(",")
            kinds[(name, *sorted((kind(a), kind(b))), *map(kind, term))] += 1
    return {one: count / kinds.total() for one, count in kinds.items()}


def test_directions_share_a_launch(tmp_path: Path) -> None:
    _, one = forms(384, 44)
    alone, _ = compiled(one, 80, tmp_path)
    group, _ = compiled(join([one, other_direction(one)]), 80, tmp_path)
    assert (group.spills, group.matrix) == (0, alone.matrix)
    assert group.machine_matrix == alone.machine_matrix
    assert group.registers <= alone.registers + 32


def test_hopper_emulates_and_its_own_instructions_are_refused(tmp_path: Path) -> None:
    """sm_90 takes mma for tiles of few rows, where kernels can be checked; wgmma has no nibbles."""
    _, nibbles = forms(128, 70, BLOCK_M=32)
    found, _ = compiled(nibbles, 90, tmp_path)
    assert found.matrix is not None
    assert found.matrix.endswith("s4.s4.s32")
    assert not any("S4" in name for name in found.machine_matrix)
    _, nibbles = forms(128, 70)
    with pytest.raises(ValueError, match="no product of nibbles with this tile on this GPU"):
        compile_ahead(nibbles, 90)


def test_what_is_not_rewritten_does_not_compile() -> None:
    _, one = forms(64, 16)
    kernel = getattr(import_source(write_source(generate(one.spec))), kernel_name(one.spec))
    args = [getattr(arg, "dtype", arg) for arg in one.args]
    with _driver_for(80), pytest.raises(Exception, match="ouro"):
        kernel.warmup(*args, grid=one.grid)


def test_threads_take_turns() -> None:
    """Triton has one hook for all: each sees its own, and none is left."""
    from triton import knobs

    class Kernel:
        def warmup(self) -> Any:
            first = knobs.runtime.add_stages_inspection_hook
            time.sleep(0.01)
            assert knobs.runtime.add_stages_inspection_hook is first
            return first

    before = knobs.runtime.add_stages_inspection_hook
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: NibbleKernel(Kernel()).warmup(), range(8)))
    assert len(set(found)) == 8
    assert knobs.runtime.add_stages_inspection_hook is before


def test_pipelines_of_others_are_kept(tmp_path: Path) -> None:
    import triton

    seen: list[int] = []

    def hook(*args: Any) -> tuple[str, str] | None:
        seen.append(len(args))
        return None if args else ("theirs", "0" * 64)

    before = triton.knobs.runtime.add_stages_inspection_hook
    triton.knobs.runtime.add_stages_inspection_hook = hook
    try:
        found, _ = compiled(forms(64, 16)[1], 80, tmp_path)
        assert triton.knobs.runtime.add_stages_inspection_hook is hook
    finally:
        triton.knobs.runtime.add_stages_inspection_hook = before
    assert S4 in found.machine_matrix
    assert 0 < seen.index(5) < len(seen)
