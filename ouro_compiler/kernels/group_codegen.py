"""Several kernels of one template as one kernel, and what a kernel writes; both from its text.

The members of a group have equal grids; the group's is as many times as long in its first
dimension, and a program's number there says which member it computes, and as which program:

    member = tl.program_id(0) % 2
    program = tl.program_id(0) // 2
    selective_scan_kernel_0(
        program,
        tl.where(member == 0, 0, 1),  # REVERSE
        None if u_ptr_1 is None else tl.where(member == 0, u_ptr_0, u_ptr_1),
        ...

Members that differ in their direction alone share their code, as above: registers and loops are
those of one (a branch for each takes up to twice the registers). Others get a branch.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping

DIRECTION = "REVERSE"  # the constant that becomes an argument
_DIRECTION = re.compile(rf"^ *{DIRECTION}: tl\.constexpr = 0,\n", re.MULTILINE)
_PROGRAM = re.compile(r"\btl\.program_id\(0\)")
_DECORATED = re.compile(r"\A@triton\.jit.*?^def ", re.DOTALL | re.MULTILINE)


def group_kernels(name: str, kernels: list[tuple[str, int]]) -> list[str]:
    """Functions that the members share, and the kernel called `name` that calls them.

    kernels: of each member the text of its forward kernel, constants bound, and its direction.
    The parameters are those of the first member with `_0` behind their names, then those of the
    second with `_1`, and so on.
    Raises ValueError if a member asks how many programs the first dimension has.
    """
    if any("num_programs(0)" in source for source, _ in kernels):
        raise ValueError(f"{name} depends on the length of its grid: it cannot be in a group")
    shared: dict[str, list[int]] = {}
    parameters, unspecialised = [], []
    for number, (source, _) in enumerate(kernels):
        shared.setdefault(source, []).append(number)
        parameters += [f"    {one}_{number}," for one in parameters_of(source)]
        unspecialised += [f"{one}_{number}" for one in _unspecialised(source)]
    functions, calls = [], []
    for index, (source, numbers) in enumerate(shared.items()):
        function, indent = f"{name}_{index}", "    "
        functions.append(_as_function(source, name, function))
        if len(shared) > 1:
            calls.append(f"    if {' | '.join(f'(member == {number})' for number in numbers)}:")
            indent += "    "
        arguments = ["program"]
        if _DIRECTION.search(source):
            arguments.append(_select({number: str(kernels[number][1]) for number in numbers}))
        for one in parameters_of(source):
            selected = _select({number: f"{one}_{number}" for number in numbers})
            missing = f"None if {one}_{numbers[0]} is None else "
            arguments.append(missing + selected if len(numbers) > 1 else selected)
        calls += [f"{indent}{function}(", *(f"{indent}    {one}," for one in arguments)]
        calls.append(f"{indent})")
    entry = [
        f"@triton.jit(do_not_specialize={unspecialised})",
        *(f"def {name}(", *parameters, "):"),
        f"    member = tl.program_id(0) % {len(kernels)}",
        f"    program = tl.program_id(0) // {len(kernels)}",
        *calls,
    ]
    return [*functions, "\n".join(entry)]


def parameters_of(source: str) -> list[str]:
    """The parameters of a kernel that are no constants, in order."""
    return [one.arg for one in _function(source).args.args if "constexpr" not in ast.dump(one)]


def written_parameters(name: str, functions: Mapping[str, str]) -> frozenset[str]:
    """The parameters of a function, one of `functions` by name, through which it may store.

    Names in the address of a `tl.store`, or passed to a function that stores, are followed back
    through assignments to parameters. What was loaded is a number, no address, and ends the way.
    """
    made: dict[str, set[str]] = {}
    wanted: set[str] = set()
    for node in ast.walk(_function(functions[name])):
        if isinstance(node, ast.Assign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for one in {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}:
                made.setdefault(one, set()).update(_addresses(node.value))
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called == "tl.store":
                wanted |= _addresses(node.args[0])
            elif called in functions:
                stored = written_parameters(called, functions)
                names = [one.arg for one in _function(functions[called]).args.args]
                given = [*zip(names, node.args, strict=False)]
                given += [(str(one.arg), one.value) for one in node.keywords]
                wanted = wanted.union(*(_addresses(v) for one, v in given if one in stored))
    seen: set[str] = set()
    while wanted:
        one = wanted.pop()
        if one not in seen:
            seen.add(one)
            wanted |= made.get(one, set())
    return frozenset(one for one in parameters_of(functions[name]) if one in seen)


def _addresses(node: ast.expr) -> set[str]:
    """Names in an expression, without those that say where to load from."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) in ("tl.load", "load"):
        return set()
    if isinstance(node, ast.Name):
        return {node.id}
    children = (one for one in ast.iter_child_nodes(node) if isinstance(one, ast.expr))
    return set().union(*(_addresses(one) for one in children))


def _select(named: dict[int, str]) -> str:
    """An expression for the argument of the member that a program computes."""
    *others, (_, text) = named.items()
    for number, one in reversed(others):
        text = f"tl.where(member == {number}, {one}, {text})"
    return text


def _function(source: str) -> ast.FunctionDef:
    function = ast.parse(source).body[-1]
    assert isinstance(function, ast.FunctionDef)
    return function


def _unspecialised(source: str) -> list[str]:
    """What `do_not_specialize` names in the decorator."""
    return [
        node.value
        for decorator in _function(source).decorator_list
        for node in ast.walk(decorator)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]


def _as_function(source: str, old: str, new: str) -> str:
    """A kernel as a function of its number in the first dimension, its direction and parameters."""
    first = "\n    program,"
    if _DIRECTION.search(source):
        first += f"\n    {DIRECTION},"
    plain = _DECORATED.sub("@triton.jit\ndef ", _DIRECTION.sub("", source))
    return _PROGRAM.sub("program", plain.replace(f"def {old}(", f"def {new}({first}"))
