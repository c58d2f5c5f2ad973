"""Products of nibbles: what is rewritten in PTX, and what comes out for GPUs."""

from __future__ import annotations

import re
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.offline_cases import linear_case, other_direction, recorded
from ouro_compiler.kernels.cache import import_source, load_kernel, write_source
from ouro_compiler.kernels.candidates import as_choice, current_choice
from ouro_compiler.kernels.codegen import generate, kernel_name
from ouro_compiler.kernels.grouping import join
from ouro_compiler.kernels.int4_matrix import NibbleKernel, use_nibbles
from ouro_compiler.kernels.launch import Launch
from ouro_compiler.kernels.offline import Resources, _driver_for, compile_ahead
from ouro_compiler.kernels.retile import retile
from tests.kernels.test_int4_fragments import BYTES, PAIR, PRODUCT

pytestmark = pytest.mark.usefixtures("empty_caches")


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

    load_kernel.cache_clear()  # another file's tests may have compiled it in this process
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
    """Half the matrix instructions in the loop, no spills, and one epilogue: so are the bits.

    No multiplication is fused in either.
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
    assert not any(one[0] == "fma.rn.f32" for one in multiplications(after))


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
