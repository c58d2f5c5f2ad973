"""Independent launches as one: orders keep every result, sources say what they must."""

from __future__ import annotations

import ast
import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.offline_cases import (
    linear_case,
    other_direction,
    quantizer_cases,
    recorded,
    scan_case,
    scan_dynamic_outlier_case,
)
from ouro_compiler.kernels.codegen import generate, template_functions
from ouro_compiler.kernels.group_codegen import group_kernels, written_parameters
from ouro_compiler.kernels.grouping import Access, group_steps, join, joinable, split, written
from ouro_compiler.kernels.launch import Launch
from ouro_compiler.kernels.spec import KernelSpec, Template
from tests.helpers import REPEATABLE

CELLS = 6
SETS = st.frozensets(st.integers(0, CELLS - 1), max_size=3)
STEPS = st.lists(
    st.builds(Access, reads=SETS, writes=SETS, key=st.sampled_from([None, "a", "b"])), max_size=14
)
MOST = 3


def both(launch: Launch) -> Launch:
    return join([launch, other_direction(launch)])


def run(steps: list[Access], numbers: list[int], memory: list[object]) -> None:
    """Every cell that a step writes depends on the step, on what it reads and on what was there."""
    for number in numbers:
        step = steps[number]
        seen = tuple(memory[cell] for cell in sorted(step.reads | step.writes))
        for cell in step.writes:
            memory[cell] = hash((number, cell, seen))


@REPEATABLE
@given(STEPS)
def test_results_are_those_of_the_given_order(steps: list[Access]) -> None:
    order = group_steps(steps, MOST)
    assert sorted(number for group in order for number in group) == list(range(len(steps)))
    expected: list[object] = [*range(CELLS)]
    run(steps, [*range(len(steps))], expected)
    for backwards in (False, True):  # members of a group run in any order
        found: list[object] = [*range(CELLS)]
        for group in order:
            assert 1 <= len(group) <= MOST
            assert len({steps[number].key for number in group}) == 1
            assert len(group) == 1 or steps[group[0]].key is not None
            run(steps, group[::-1] if backwards else group, found)
        assert found == expected


def chain(keys: str, cell: int) -> list[Access]:
    """Steps that each read what the one before wrote."""
    return [
        Access(reads=frozenset({cell + i}), writes=frozenset({cell + i + 1}), key=key)
        for i, key in enumerate(keys)
    ]


def test_equal_chains_go_together() -> None:
    """One after the other as a graph has them, one with a step before that the other lacks."""
    steps = [*chain("abca", 0), *chain("xabca", 100), *chain("abca", 200)]
    order = group_steps(steps)
    assert [[steps[number].key for number in group] for group in order] == [
        ["x"],
        *([key] * 3 for key in "abca"),
    ]


def test_chains_of_other_keys_stay_apart() -> None:
    steps = [*chain("ab", 0), *chain("cd", 100)]
    assert all(len(group) == 1 for group in group_steps(steps))


STORED = {
    Template.QUANTIZE: {"codes_ptr", "outlier_scale_ptr", "outlier_start_ptr"},
    Template.ADD_NORM_QUANTIZE: {
        *("codes_ptr", "outlier_scale_ptr", "outlier_start_ptr", "value_ptr", "total_ptr")
    },
    Template.CROSS_MERGE_QUANTIZE: {
        *("codes_ptr", "outlier_scale_ptr", "outlier_start_ptr", "value_ptr")
    },
    Template.CONV_QUANTIZE: {"codes_ptr", "outlier_scale_ptr", "outlier_start_ptr", "value_ptr"},
    Template.GATE_SUM_QUANTIZE: {
        *("codes_ptr", "outlier_scale_ptr", "outlier_start_ptr", "value_ptr")
    },
    Template.DEQUANTIZE: {"y_ptr"},
    Template.LINEAR: {"y_ptr", "columns_ptr"},
    Template.SCAN: {"y_ptr"},
    Template.SCAN_CHUNKS: {"elapsed_ptr", "state_ptr"},
    Template.SCAN_DYNAMIC_OUTLIER: {"y_ptr"},
    Template.SCAN_DYNAMIC_OUTLIER_CHUNKS: {"elapsed_ptr", "state_ptr"},
    Template.QUANTIZED_SCAN: {"y_ptr"},
    Template.CONV: {"y_ptr"},
}


@pytest.mark.parametrize("template", list(STORED), ids=lambda one: one.value)
def test_what_a_template_writes(template: Template) -> None:
    functions = template_functions(template)
    found = written_parameters(f"{template.value}_kernel", functions)
    assert {one for one in found if one.endswith("_ptr")} == STORED[template]
    launch = next(one for one in LAUNCHES if one.spec.template is template)
    pointers = [isinstance(one, Tensor) for one in launch.args]
    marked = [w and p for w, p in zip(written(launch), pointers, strict=True)]
    assert 0 < sum(marked) <= len(STORED[template])


def test_stores_of_called_functions_are_found() -> None:
    functions = {
        "keep": "def keep(pointers, x, mask):\n    tl.store(pointers, x, mask=mask)",
        "both": "def both(first, second, x):\n    keep(mask=None, x=x, pointers=second + x)",
        "f": (
            "def f(a_ptr, b_ptr, c_ptr, d_ptr, SIZE: tl.constexpr):\n"
            "    x = tl.load(a_ptr)\n"
            "    for i in range(SIZE):\n"
            "        both(b_ptr, places, x)\n"
            "        places = moved + tl.load(d_ptr)\n"
            "        moved = c_ptr + i"
        ),
    }
    assert written_parameters("f", functions) == {"c_ptr"}
    assert written_parameters("both", functions) >= {"second"}


def _launches() -> list[Launch]:
    from benchmarks.offline_cases import conv_case, map_cases, quantized_scan_case

    found = recorded(lambda: linear_case(96, 64, packed=True, outlier_bits=8))
    found += recorded(lambda: quantizer_cases(96)) + recorded(lambda: map_cases(96))
    for case in (scan_case, quantized_scan_case):
        found += recorded(lambda case=case: case(96, 4))  # type: ignore[misc]
    for case in (scan_case, scan_dynamic_outlier_case):
        found += recorded(lambda case=case: case(96, 1, length=784, batch=1))  # type: ignore[misc]
    return found + recorded(lambda: conv_case(96))


LAUNCHES = _launches()


def entry(spec: KernelSpec) -> ast.FunctionDef:
    function = ast.parse(generate(spec)).body[-1]
    assert isinstance(function, ast.FunctionDef)
    return function


@pytest.mark.parametrize("launch", LAUNCHES, ids=lambda one: one.spec.label)
def test_directions_share_their_code(launch: Launch) -> None:
    group = both(launch)
    assert group.grid == (2 * launch.grid[0], *launch.grid[1:])
    assert group.spec.label == f"2 of {launch.spec.label}"
    assert split(group) == [launch, other_direction(launch)]
    assert len(group.args) == len(entry(group.spec).args.args) == 2 * len(launch.args)
    body = ast.unparse(entry(group.spec))
    assert body.count(f"{launch.spec.template.value}_kernel_0(") == 1
    assert "if member" not in body
    assert "tl.where(member == 0, 0, 1)" in body
    assert "program_id(0)" not in ast.unparse(ast.parse(generate(group.spec)).body[-2])


def test_chunks_of_four_directions_take_two_launches() -> None:
    """Each scan is a launch that gathers and one that scans; none reads what another writes."""
    launches = [
        other_direction(one) if reverse else one
        for reverse in (False, True, False, True)
        for one in recorded(lambda: scan_case(96, 1, length=784, batch=1))
    ]
    steps = [
        Access(
            reads=frozenset(id(x) for x, w in pairs if not w and isinstance(x, Tensor)),
            writes=frozenset(id(x) for x, w in pairs if w and isinstance(x, Tensor)),
            key=joinable(one),
        )
        for one in launches
        for pairs in [[*zip(one.args, written(one), strict=True)]]
    ]
    assert group_steps(steps) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    gathered, scanned = (join([launches[i] for i in one]) for one in group_steps(steps))
    assert gathered.spec.label == "4 of selective_scan_chunks"
    assert scanned.grid == (4, 1, 49 * 3)


def test_other_members_get_a_branch() -> None:
    plain, asymmetric = (
        one
        for one in recorded(lambda: quantizer_cases(96))
        if one.spec.template is Template.QUANTIZE
    )
    group = join([plain, asymmetric, other_direction(plain)])
    body = ast.unparse(entry(group.spec))
    assert "if (member == 0) | (member == 2):" in body
    assert "if member == 1:" in body
    assert group.spec.label == "3 of quantize_dynamic_outlier 4/8"


def test_only_equal_grids_and_templates_are_joined() -> None:
    quantizers = recorded(lambda: quantizer_cases(96))
    with pytest.raises(ValueError, match="one template on equal grids"):
        join([quantizers[0], quantizers[-1]])
    wider = dataclasses.replace(quantizers[0], grid=(64, 20, 1))
    with pytest.raises(ValueError, match="one template on equal grids"):
        join([quantizers[0], wider])
    with pytest.raises(ValueError, match="only single launches"):
        join([both(quantizers[0]), both(quantizers[0])])
    assert join(quantizers[:1]) is quantizers[0]


def test_a_kernel_that_counts_its_programs_is_refused() -> None:
    source = "@triton.jit\ndef f(x_ptr):\n    tl.store(x_ptr, tl.num_programs(0))"
    with pytest.raises(ValueError, match="it cannot be in a group"):
        group_kernels("f", [(source, 0), (source, 0)])


def test_digests_of_groups() -> None:
    specs = [both(one).spec for one in LAUNCHES] + [one.spec for one in LAUNCHES]
    assert len({spec.digest for spec in specs}) == len(set(specs))
    assert [one.others for one in specs[0].members] == [(), ()]
