"""Kernels compiled for GPUs that are not here: no spills, register caps, the right instructions.

Caps: 64 registers for scans of 16 states (KERNELS' design), and what lets one program of 256
threads run on a multiprocessor for a 64 x 128 tile with two accumulators and the list of columns.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.offline_cases import (
    chain_case,
    conv_case,
    depthwise_case,
    linear_case,
    map_cases,
    norm_case,
    other_direction,
    quantized_scan_case,
    quantizer_cases,
    recorded,
    scan_case,
    scan_dynamic_outlier_case,
)
from ouro_compiler.errors import UsageError
from ouro_compiler.kernels.candidates import as_choice, candidates, current_choice, offered_on
from ouro_compiler.kernels.grouping import join
from ouro_compiler.kernels.launch import Launch, launch_options, record_launches
from ouro_compiler.kernels.offline import (
    Resources,
    _driver_for,
    compile_ahead,
    innermost_loops,
    instructions_of,
    loop_spans,
    parse_architectures,
    parse_sass,
)
from ouro_compiler.kernels.retile import retile
from ouro_compiler.kernels.spec import KernelSpec, Template
from ouro_compiler.runtime.tuning_trials import NO_COMPILE, RefusedError, compile_candidate

pytestmark = pytest.mark.usefixtures("empty_caches")
# The suite "offline" compiles for all three; sm_89's machine code is mostly sm_80's.
ARCHITECTURES = (80, 90)
EACH = (80, pytest.param(89, marks=pytest.mark.slow), 90)
HALF, FULL = torch.float16, torch.float32


def compiled(launches: list[Launch], arch: int) -> list[Resources]:
    """Compile launches; check what holds for every kernel."""
    found = [compile_ahead(launch, arch) for launch in launches]
    for launch, one in zip(launches, found, strict=True):
        assert (one.spills, one.stack_bytes) == (0, 0), (launch.spec.label, one)
        assert launch_options(launch.spec)["enable_fp_fusion"] is False
    return found


@pytest.mark.parametrize("arch", EACH)
@pytest.mark.parametrize(
    ("shape", "packed", "outlier_bits", "cap", "cap_90"),
    [
        ((768, 3072), True, 8, 232, 192),
        ((768, 3072), False, 8, 232, 192),
        ((768, 3072), True, 16, 232, 192),
        ((768, 3072), False, 16, 232, 192),
        ((384, 44), True, 8, 176, 128),
        ((12, 384), True, 8, 200, 184),
    ],
)
def test_linear(
    shape: tuple[int, int], packed: bool, outlier_bits: int, cap: int, cap_90: int, arch: int
) -> None:
    launches = recorded(lambda: linear_case(*shape, packed=packed, outlier_bits=outlier_bits))
    (product,) = compiled(launches, arch)
    assert product.registers <= (cap_90 if arch == 90 else cap)
    assert product.matrix is not None
    if arch == 90:
        assert product.matrix.startswith("wgmma.mma_async")
        assert product.matrix.endswith("s32.s8.s8")
    else:
        assert product.matrix.startswith("mma.sync.aligned.m16n8k32.row.col")
        assert product.matrix.endswith("s32.s8.s8.s32")


SHARED_BYTES = {80: 166_912, 90: 232_448}  # a program's most (CUDA's tables of compute capability)
PROJECTIONS = {  # of Vim-T, S and B
    "in_proj": ((192, 768), (384, 1536), (768, 3072)),
    "x_proj": ((384, 44), (768, 56), (1536, 80)),
    "dt_proj": ((12, 384), (24, 768), (48, 1536)),
    "out_proj": ((384, 192), (768, 384), (1536, 768)),
}


def tuned_forms(shape: tuple[int, int], arch: int, outlier_bits: int = 8) -> list[Launch]:
    """A product with every candidate of its first list, and steps and stages at its default."""
    (launch,) = recorded(lambda: linear_case(*shape, packed=True, outlier_bits=outlier_bits))
    default = current_choice(launch.spec)
    found = candidates(launch.spec, default, 32 * 197)
    return [retile(launch, choice) for choice in found if offered_on(f"GPU sm_{arch}", choice)]


def fits(launch: Launch, arch: int) -> bool:
    """Does it compile within a multiprocessor's shared memory, and without spills?"""
    found = compile_ahead(launch, arch)
    assert found.shared_bytes <= SHARED_BYTES[arch], (current_choice(launch.spec), found)
    assert found.matrix is not None
    return (found.spills, found.stack_bytes) == (0, 0)


@pytest.mark.parametrize("arch", [80, 90])
def test_the_largest_candidates_of_products(arch: int) -> None:
    """Of all sizes of all projections, what has the most sums a warp and bytes in flight."""
    forms = {
        form.spec: form
        for shapes in PROJECTIONS.values()
        for shape in shapes
        for form in tuned_forms(shape, arch)
    }
    largest = sorted(forms.values(), key=lambda one: -_bytes_in_flight(one))[:2]
    assert all(fits(one, arch) for one in largest)


def test_a_candidate_that_does_not_compile_is_refused() -> None:
    """What the compiler raises is its reason; blocks are powers of two."""
    with record_launches() as recording:
        linear_case(384, 44, packed=True, outlier_bits=8)
    (launch,) = recording.launches
    with _driver_for(90):
        compile_candidate(launch)
        with pytest.raises(RefusedError, match=NO_COMPILE):
            compile_candidate(retile(launch, as_choice({"BLOCK_K": 48})))


def _bytes_in_flight(launch: Launch) -> int:
    spec = launch.spec
    stages = min(spec.num_stages, -(-spec["COLUMNS"] // (2 * spec["BLOCK_K"])))
    return stages * spec["BLOCK_K"] * (2 * spec["BLOCK_M"] + spec["BLOCK_N"])


@pytest.mark.slow  # some 30 compilations each, two seconds a compilation
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    ("projection", "size"), [("in_proj", 0), ("x_proj", 2), ("dt_proj", 1), ("out_proj", 2)]
)
def test_every_candidate_of_a_product(projection: str, size: int, arch: int) -> None:
    forms = tuned_forms(PROJECTIONS[projection][size], arch)
    assert len(forms) >= 15
    whole = sum(fits(one, arch) for one in forms)
    print(f"{projection}, sm_{arch}: {whole} of {len(forms)} candidates do not spill")
    assert whole >= 0.8 * len(forms)


@pytest.mark.parametrize("arch", [80, 90])
def test_linear_with_every_epilogue(arch: int) -> None:
    for activation in ("silu", "softplus", "gelu", "gelu_tanh"):
        launches = recorded(
            lambda activation=activation: linear_case(  # type: ignore[misc]
                384, 768, packed=True, outlier_bits=8, activation=activation, residual=True
            )
        )
        assert compiled(launches, arch)[0].registers <= 240


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("packed", [True, False])
def test_linear_with_fp32_outliers(packed: bool, arch: int) -> None:
    for shape in ((384, 768), (384, 44)):
        options = {"packed": packed, "outlier_bits": 16, "dtype": FULL, "residual": True}
        launches = recorded(lambda shape=shape, options=options: linear_case(*shape, **options))  # type: ignore[misc]
        assert compiled(launches, arch)[0].registers <= 240


@pytest.mark.parametrize("arch", EACH)
@pytest.mark.parametrize("channels", [192, 1536])
def test_quantizers_divide_exactly(channels: int, arch: int) -> None:
    launches = recorded(lambda: quantizer_cases(channels))
    for launch, found in zip(launches, compiled(launches, arch), strict=True):
        quantizes = "NEVER" in dict(launch.spec.constants)
        assert found.exact_division == quantizes, launch.spec.label
        assert found.registers <= 96
    plain = compile_ahead(launches[0], arch)
    assert not plain.approximate_division


@pytest.mark.parametrize("arch", [80, 90])
def test_maps_read_by_index(arch: int) -> None:
    """Rows and columns of a map cost a token some twenty instructions, and no registers to speak
    of; a group of both orders has a loop for each."""
    in_row = recorded(lambda: quantizer_cases(96))[0]
    _, scan, _ = launches = recorded(lambda: map_cases(96))
    assert [one.spec["MAP_WIDTH"] for one in launches] == [14, 14, 14]
    plain, found, scanned, merged = compiled([in_row, *launches], arch)
    assert found.registers <= plain.registers + 8
    assert found.loops[0] <= plain.loops[0] + 40
    assert scanned.registers <= 64
    assert scanned.shared_bytes == 0
    assert merged.registers <= 96
    assert merged.exact_division
    flat = dataclasses.replace(scan, spec=without_map(scan.spec))
    members = [flat, scan, other_direction(flat), other_direction(scan)]
    (both,) = compiled([join(members)], arch)
    assert both.registers <= scanned.registers + 24
    assert len(both.loops) == 2
    assert max(both.loops) <= scanned.loops[0] + 24


def without_map(spec: KernelSpec) -> KernelSpec:
    constants = {**dict(spec.constants), "MAP_WIDTH": 0}
    return dataclasses.replace(spec, constants=tuple(sorted(constants.items())))


@pytest.mark.parametrize("dtype", [HALF, torch.bfloat16, FULL])
@pytest.mark.parametrize(("states", "cap"), [(16, 96), (8, 96), (1, 80)])
def test_scan(states: int, cap: int, dtype: torch.dtype) -> None:
    """A program is one warp: with 96 registers 21 run on a multiprocessor, five a scheduler."""
    launches = recorded(lambda: scan_case(384, states, dtype=dtype))
    for arch in ARCHITECTURES:
        found = compiled(launches, arch)[0]
        assert found.shared_bytes == 0, "the sum over states needs no shuffles through memory"
        assert found.registers <= cap
        if arch == 90 and states == 16:
            assert len(found.loops) == 1
            assert found.loops[0] <= 126 * 1.1
            check_order(launches[0], arch, shuffles=0)


@pytest.mark.parametrize(("states", "loop"), [(16, 62), (8, 49)])
def test_scan_of_one_image(states: int, loop: int) -> None:
    """Four lanes a channel: half the instructions a step, and shuffles for y alone."""
    for arch in (80, 90):
        launches = recorded(lambda: scan_case(384, states, dtype=FULL, batch=1))
        spec = launches[0].spec
        assert (spec["SHARE"], spec["BLOCK_D"], spec["STEPS"]) == (4, 8, 4)
        (found,) = compiled(launches, arch)
        assert found.shared_bytes == 0
        assert found.registers <= 128
        if arch == 90:
            assert len(found.loops) == 1
            assert found.loops[0] / 4 <= loop * 1.1
        check_order(launches[0], arch, shuffles=2)


def test_scan_in_chunks() -> None:
    """A second state beside the first costs a token five instructions of 38."""
    for batch, launched, loop in ((1, 2, 34), (32, 1, 38)):
        launches = recorded(lambda batch=batch: scan_case(96, 1, length=3136, batch=batch))  # type: ignore[misc]
        assert [one.spec["CHUNK"] for one in launches] == [28] * launched
        for found in compiled(launches, 90):
            assert found.shared_bytes == 0
            assert found.registers <= 80
        assert launches[-1].spec["STEPS"] == 4
        assert found.loops[-1] / 4 <= loop * 1.1
    launches = recorded(lambda: scan_dynamic_outlier_case(96, 1, length=3136, batch=1))
    for found in compiled(launches[2:], 90):
        assert found.shared_bytes == 0
        assert found.registers <= 96


def check_order(launch: Launch, arch: int, shuffles: int) -> None:
    """The operands of the next token are asked for before y is stored; `shuffles` a token.

    Only what is written as one is a fused multiply-add: a state, its part of y, and D u.
    """
    instructions = instructions_of(launch, arch)
    names = [name.split(".")[0] for _, name, _ in instructions]
    tokens = names.count("STG")  # the program's text has each of its tokens once
    assert names.count("SHFL") == shuffles * tokens
    states = launch.spec["STATES"] // launch.spec["SHARE"]
    rows = launch.spec["LANES"] // launch.spec["SHARE"]
    assert names.count("FFMA") == (2 * states - rows + 1) * tokens
    ((first, last),) = loop_spans(instructions)
    loop = [name.split(".")[0] for at, name, _ in instructions if first <= at <= last]
    assert loop.count("STG") >= launch.spec["STEPS"]
    asked = loop.count("LDG") // loop.count("STG")
    stores = [index for index, name in enumerate(loop) if name == "STG"]
    for number, index in enumerate(stores, 1):
        assert loop[:index].count("LDG") >= asked * number


@pytest.mark.parametrize("arch", [80, 90])
def test_scan_variants_and_conv(arch: int) -> None:
    for options in ({"whole": True}, {"reverse": True}, {"groups": 4}):
        found = compiled(recorded(lambda options=options: scan_case(384, 16, **options)), arch)  # type: ignore[misc]
        assert found[0].registers <= 96
    assert compiled(recorded(lambda: conv_case(384)), arch)[0].registers <= 96
    for case in ((96, 56, 56), (160, 196)):
        launches = recorded(lambda case=case: depthwise_case(*case))  # type: ignore[misc]
        assert compiled(launches, arch)[0].registers <= 128


@pytest.mark.parametrize("arch", EACH)
def test_norm(arch: int) -> None:
    for channels in (96, 768):
        (found,) = compiled(recorded(lambda channels=channels: norm_case(channels)), arch)  # type: ignore[misc]
        assert found.registers <= 128


@pytest.mark.parametrize(("states", "loop"), [(16, 170), (8, 122), (1, 72)])
def test_scan_dynamic_outlier(states: int, loop: int) -> None:
    """delta's codes cost a token some 40 instructions; B and C are dequantized once, before."""
    launches = recorded(lambda: scan_dynamic_outlier_case(384, states))
    templates = [launch.spec.template for launch in launches]
    assert templates == [*[Template.DEQUANTIZE] * 2, Template.SCAN_DYNAMIC_OUTLIER]
    for arch in ARCHITECTURES:
        found = compiled(launches, arch)[-1]
        assert found.shared_bytes == 0, "B and C come to the lanes without shared memory"
        assert found.registers <= 96
        if arch == 90:
            assert len(found.loops) == 1
            assert found.loops[0] / launches[-1].spec["STEPS"] <= loop * 1.1


def test_scan_dynamic_outlier_of_one_image() -> None:
    launch = recorded(lambda: scan_dynamic_outlier_case(384, 16, batch=1))[-1]
    (found,) = compiled([launch], 90)
    assert (launch.spec["SHARE"], found.shared_bytes) == (4, 0)
    assert found.registers <= 128
    assert found.loops[0] / 4 <= 103 * 1.1
    check_order(launch, 90, shuffles=2)


@pytest.mark.parametrize("outlier_bits", [8, 16])
def test_scan_dynamic_outlier_with_everything(outlier_bits: int) -> None:
    options = {"outlier_bits": outlier_bits, "whole": True}
    for arch in (80, 90):
        found = compiled(recorded(lambda: scan_dynamic_outlier_case(384, 16, **options)), arch)[-1]
        assert found.registers <= 128


@pytest.mark.parametrize("arch", EACH)
def test_quantized_scan(arch: int) -> None:
    """Sixteen states with their decays and inputs: twice a plain scan's registers, no spills."""
    for options, cap in (
        ({"states": 16}, 144),
        ({"states": 16, "logarithmic": True}, 144),
        ({"states": 8, "factor": True}, 96),
        ({"states": 1}, 64),
    ):
        launches = recorded(lambda options=options: quantized_scan_case(384, **options))  # type: ignore[misc]
        (found,) = compiled(launches, arch)
        assert found.registers <= cap, options
        assert found.shared_bytes == 0, "the largest state of a channel needs no shuffles"
        assert found.exact_division


@pytest.mark.parametrize("arch", EACH)
def test_both_directions_in_one_launch(arch: int) -> None:
    """A group takes what one of its members takes: one loop for both, no spills."""
    cases = [
        *recorded(lambda: linear_case(384, 44, packed=True, outlier_bits=8)),
        *recorded(lambda: scan_case(384, 16)),
    ]
    if arch == 90:
        cases.append(recorded(lambda: quantizer_cases(384))[4])  # the convolution's
    for single in cases:
        group = join([single, other_direction(single)])
        alone, found = compiled([single, group], arch)
        assert found.registers <= alone.registers + 32, group.spec.label
        assert len(found.loops) == len(alone.loops)
        assert found.instructions <= alone.instructions + 160
        assert (found.shared_bytes, found.matrix) == (alone.shared_bytes, alone.matrix)


@pytest.mark.parametrize("arch", EACH)
def test_quantizer_and_product_in_one_launch(arch: int) -> None:
    """Codes and lists of a tile in registers: fewer of them than the product by itself takes."""
    for inputs, outputs in ((12, 384), (48, 1536)):
        single = chain_case(inputs, outputs)
        pair = compiled([single, join([single, other_direction(single)])], arch)
        for found, cap in zip(pair, (136, 184), strict=True):
            assert found.registers <= cap
            assert found.exact_division
            assert not found.approximate_division
            assert found.matrix is not None


@pytest.mark.parametrize("arch", [80, 90])
def test_quantizers_of_several_widths_in_one_launch(arch: int) -> None:
    members = [recorded(lambda width=width: quantizer_cases(width))[0] for width in (12, 16, 16)]
    (found,) = compiled([join([*members, *map(other_direction, members)])], arch)
    assert found.registers <= 64
    assert found.exact_division
    assert not found.approximate_division


def test_what_was_compiled_ahead_is_found() -> None:
    launch = recorded(lambda: scan_case(64, 4))[0]
    script = (
        "from benchmarks.offline_cases import recorded, scan_case\n"
        "from ouro_compiler.kernels.offline import compile_ahead\n"
        "import pathlib, triton\n"
        "compile_ahead(recorded(lambda: scan_case(64, 4))[0], 90)\n"
        "print(len(list(pathlib.Path(triton.knobs.cache.dir).rglob('*.cubin'))))"
    )
    import triton

    folder = Path(triton.knobs.cache.dir)
    compile_ahead(launch, 90)
    before = len(list(folder.rglob("*.cubin")))
    result = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "TRITON_CACHE_DIR": str(folder)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(result.stdout) == before, "another process compiled it again"


def test_architectures() -> None:
    assert parse_architectures("sm_80, sm_90,sm_80") == (80, 90)
    for wrong in ("", "90", "sm_75", "sm_80;sm_90"):
        with pytest.raises(UsageError, match="no architecture of: sm_80"):
            parse_architectures(wrong)


SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   MOV R2, 0x1 ;
        /*0020*/              @!P0 IADD3 R3, R2, 0x1, RZ ;
        /*0030*/                   FFMA R4, R3, R3, R4 ;
        /*0040*/               @P1 BRA 0x20 ;
        /*0050*/                   EXIT ;
        /*0060*/               @P2 BRA 0x10 ;
        /*0070*/                   BRA 0x70;
"""


def test_reading_disassembly() -> None:
    instructions = parse_sass(SASS)
    assert [name for _, name, _ in instructions] == [
        *("LDC", "MOV", "IADD3", "FFMA", "BRA", "EXIT", "BRA", "BRA"),
    ]
    assert innermost_loops(instructions) == (3,)
