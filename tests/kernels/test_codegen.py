"""Generated sources: self-contained, deterministic, exactly what the spec says."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.offline_cases import cases, chain_case, recorded
from ouro_compiler.kernels import codegen
from ouro_compiler.kernels.codegen import generate, kernel_name
from ouro_compiler.kernels.spec import Epilogue, KernelSpec, Template, make_spec
from tests.helpers import REPEATABLE

LAUNCHES = [*(one for _, run in cases() for one in recorded(run)), chain_case(12, 384)]
SPECS = list(dict.fromkeys(launch.spec for launch in LAUNCHES))
LINEAR = next(spec for spec in SPECS if spec.template is Template.LINEAR)


def kernel_of(source: str, spec: KernelSpec) -> ast.FunctionDef:
    found = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    assert found[-1].name == kernel_name(spec)
    return found[-1]


def test_every_template_is_launched() -> None:
    """Triton's; C++ has some of its own."""
    files = {path.stem for path in Path(codegen.__file__).parent.glob("templates/*.py")}
    assert {spec.template for spec in SPECS} == {one for one in Template if one.value in files}


def test_every_template_has_a_file() -> None:
    folder = Path(codegen.__file__).parent
    files = [*folder.glob("templates/*.py"), *folder.glob("cpp/templates/*.cpp")]
    assert {one.value for one in Template} <= {path.stem for path in files}


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.label} {spec.digest[:6]}")
def test_source_has_the_specs_constants_and_needs_nothing_else(spec: KernelSpec) -> None:
    source = generate(spec)
    arguments = kernel_of(source, spec).args
    bound = arguments.args[len(arguments.args) - len(arguments.defaults) :]
    values = {a.arg: ast.literal_eval(v) for a, v in zip(bound, arguments.defaults, strict=True)}
    assert values == dict(spec.constants)
    imported = [
        n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ImportFrom | ast.Import)
    ]
    assert {alias.name for node in imported for alias in node.names} == {
        "triton",
        "triton.language",
    }
    assert generate(spec) == source


def test_arguments_of_a_launch_are_the_parameters_without_a_value() -> None:
    for launch in LAUNCHES:
        arguments = kernel_of(generate(launch.spec), launch.spec).args
        assert len(launch.args) == len(arguments.args) - len(arguments.defaults)


@REPEATABLE
@given(st.lists(st.sampled_from(list(Epilogue)), max_size=4))
def test_epilogue_comes_in_the_order_given(wanted: list[Epilogue]) -> None:
    spec = KernelSpec(template=Template.LINEAR, constants=LINEAR.constants, epilogue=tuple(wanted))
    body = ast.unparse(kernel_of(generate(spec), spec))
    marks = {
        "bias_ptr + out": Epilogue.BIAS,
        "y = silu(y)": Epilogue.SILU,
        "y = softplus(y)": Epilogue.SOFTPLUS,
        "y = gelu(y)": Epilogue.GELU,
        "y = gelu_tanh(y)": Epilogue.GELU_TANH,
        "residual_ptr + first_row": Epilogue.RESIDUAL,
    }
    lines = [kind for line in body.splitlines() for mark, kind in marks.items() if mark in line]
    assert lines == wanted


def test_no_hole_is_left() -> None:
    assert not any("epilogue>" in generate(spec) for spec in SPECS)


@pytest.mark.parametrize("change", ["missing", "unknown"])
def test_constants_must_be_the_templates(change: str) -> None:
    constants = dict(LINEAR.constants)
    if change == "missing":
        del constants["BLOCK_M"]
    else:
        constants["BLOCK_Q"] = 3
    with pytest.raises(ValueError, match="linear_dynamic_outlier takes the constants"):
        generate(make_spec(Template.LINEAR, constants))


def test_only_a_template_with_a_hole_takes_an_epilogue() -> None:
    scan = next(spec for spec in SPECS if spec.template is Template.SCAN)
    wrong = make_spec(Template.SCAN, dict(scan.constants), epilogue=(Epilogue.SILU,))
    with pytest.raises(ValueError, match="selective_scan has no epilogue"):
        generate(wrong)


def test_specs_hold_sorted_integers() -> None:
    with pytest.raises(ValueError, match="sorted by name"):
        KernelSpec(template=Template.SCAN, constants=(("B", 1), ("A", 2)))
    with pytest.raises(ValueError, match="must be integers"):
        KernelSpec(template=Template.SCAN, constants=(("A", "1; import os"),))  # type: ignore[arg-type]


def test_digests_tell_specs_apart() -> None:
    assert len({spec.digest for spec in SPECS}) == len(SPECS)
    assert make_spec(LINEAR.template, dict(LINEAR.constants)).digest != LINEAR.digest
