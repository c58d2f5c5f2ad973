"""KernelSpec -> the text of one self-contained Triton file.

A template is valid Triton by itself. Generating it (1) replaces imports from other templates by the
functions they name, (2) gives every constexpr parameter its value, (3) fills the epilogue hole, the
lines between `# <epilogue>` and `# </epilogue>`. A group's kernels then become functions of one
kernel (`group_codegen.py`).
"""

from __future__ import annotations

import ast
import functools
import re
from dataclasses import replace
from pathlib import Path

from ouro_compiler.kernels.group_codegen import DIRECTION, group_kernels
from ouro_compiler.kernels.spec import Epilogue, KernelSpec, Template

_TEMPLATES = Path(__file__).parent / "templates"
_PACKAGE = "ouro_compiler.kernels.templates."
_HOLE = re.compile(r"^( *)# <epilogue>\n.*?^ *# </epilogue>\n", re.MULTILINE | re.DOTALL)
_EPILOGUE = {
    Epilogue.BIAS: "y += tl.load(bias_ptr + out).to(tl.float32)[None, :]",
    Epilogue.SILU: "y = silu(y)",
    Epilogue.SOFTPLUS: "y = softplus(y)",
    Epilogue.GELU: "y = gelu(y)",
    Epilogue.GELU_TANH: "y = gelu_tanh(y)",
    Epilogue.RESIDUAL: (
        "y += tl.load(residual_ptr + first_row * OUTPUTS + offs, mask=mask, other=0.0)"
        ".to(tl.float32)"
    ),
}


def generate(spec: KernelSpec) -> str:
    """The source of a spec's kernel. Raises ValueError if spec and template do not fit."""
    functions: dict[str, str] = {}
    imports: list[str] = []
    _collect(spec.template.value, functions, imports)
    kernel = kernel_name(spec)
    template = functions.pop(kernel)
    if spec.others:
        forward = [_forward(one) for one in spec.members]
        bound = [_fill_epilogue(_bind_constants(template, one), one) for one in forward]
        members = [(text, one[DIRECTION]) for text, one in zip(bound, spec.members, strict=True)]
        functions[kernel] = "\n\n\n".join(group_kernels(kernel, members))
    else:
        functions[kernel] = _fill_epilogue(_bind_constants(template, spec), spec)
    header = f'"""{spec.label}, generated from kernels/templates by ouro_compiler."""'
    return "\n\n\n".join([header + "\n\n" + "\n".join(imports), *functions.values()]) + "\n"


def kernel_name(spec: KernelSpec) -> str:
    """The name of the kernel in the generated file."""
    return f"{spec.template.value}_kernel"


def template_functions(template: Template) -> dict[str, str]:
    """The functions of a template as they are written, by name, with all that they call."""
    functions: dict[str, str] = {}
    _collect(template.value, functions, [])
    return functions


@functools.cache
def _parse(name: str) -> tuple[str, ast.Module]:
    text = (_TEMPLATES / f"{name}.py").read_text()
    return text, ast.parse(text)


def _collect(name: str, functions: dict[str, str], imports: list[str]) -> None:
    """Add the functions of a template after those it imports, each once."""
    text, tree = _parse(name)
    lines = text.splitlines()
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(_PACKAGE):
            _collect((node.module or "").removeprefix(_PACKAGE), functions, imports)
        elif isinstance(node, ast.Import):
            line = lines[node.lineno - 1]
            if line not in imports:
                imports.append(line)
        elif isinstance(node, ast.FunctionDef):
            first = min(one.lineno for one in node.decorator_list) - 1
            functions.setdefault(node.name, "\n".join(lines[first : node.end_lineno]))


def _forward(spec: KernelSpec) -> KernelSpec:
    constants = {**dict(spec.constants), DIRECTION: 0}
    return replace(spec, constants=tuple(sorted(constants.items())))


def _bind_constants(source: str, spec: KernelSpec) -> str:
    """Give each `NAME: tl.constexpr` parameter of the kernel its value as a default."""
    function = ast.parse(source).body[-1]
    assert isinstance(function, ast.FunctionDef)
    wanted = [a for a in function.args.args if a.annotation and "constexpr" in ast.dump(a)]
    values = dict(spec.constants)
    names = {argument.arg for argument in wanted}
    if names != set(values):
        raise ValueError(
            f"{spec.template.value} takes the constants {sorted(names)}, got {sorted(values)}"
        )
    lines = source.splitlines()
    for argument in wanted:
        line, end = (argument.end_lineno or 0) - 1, argument.end_col_offset or 0
        lines[line] = f"{lines[line][:end]} = {values[argument.arg]}{lines[line][end:]}"
    return "\n".join(lines)


def _fill_epilogue(source: str, spec: KernelSpec) -> str:
    hole = _HOLE.search(source)
    if hole is None:
        if spec.epilogue:
            raise ValueError(f"{spec.template.value} has no epilogue to fill")
        return source
    filled = "".join(f"{hole.group(1)}{_EPILOGUE[one]}\n" for one in spec.epilogue)
    return source[: hole.start()] + filled + source[hole.end() :]
