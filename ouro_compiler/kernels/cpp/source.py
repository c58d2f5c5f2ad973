"""KernelSpec -> the text of one self-contained C++ file.

A template is C++ that names its constants; generating it puts their values in front, its headers in
place, and behind it `call`, which takes the kernel's arguments from an array of 64-bit words.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

from ouro_compiler.kernels.spec import KernelSpec

_TEMPLATES = Path(__file__).parent / "templates"
_INCLUDE = re.compile(r'^#include "(\w+\.h)"\n', re.MULTILINE)


def generate(spec: KernelSpec) -> str:
    """The source of a spec's kernel, whose entry is `call(const int64_t* words, int64_t threads)`.

    A word is an address, an integer, or the bits of a double; the kernel's last parameter is the
    number of threads it may use.
    """
    constants = "".join(f"constexpr int {name} = {value};\n" for name, value in spec.constants)
    template = "".join(text for _, text in _with_headers(f"{spec.template.value}.cpp"))
    heading = f"// {spec.label}, generated from kernels/cpp/templates.\n"
    return heading + constants + template + _entry(template, spec.template.value)


def _entry(template: str, name: str) -> str:
    match = re.search(rf'extern "C"[^(]*\b{name}\(([^)]*)\)', template)
    assert match is not None, f"{name} is not in its template"
    *parameters, threads = (part.strip() for part in match.group(1).split(","))
    assert threads == "int64_t threads", f"the last parameter of {name} is not its threads"
    words = []
    for index, parameter in enumerate(parameters):
        kind = parameter.rpartition("*")[0] + "*" if "*" in parameter else parameter.split()[0]
        word = f"words[{index}]"
        words.append(f"as_double({word})" if kind in ("float", "double") else f"({kind}){word}")
    arguments = ", ".join([*words, "threads"])
    return (
        "static inline double as_double(int64_t word) {\n"
        "    double value;\n    memcpy(&value, &word, sizeof value);\n    return value;\n}\n\n"
        'extern "C" void call(const int64_t* words, int64_t threads) {\n'
        f"    {name}({arguments});\n}}\n"
    )


@functools.cache
def _with_headers(name: str) -> tuple[tuple[str, str], ...]:
    """(file, text) of a template after the headers that it includes, each once."""
    found: dict[str, str] = {}
    text = (_TEMPLATES / name).read_text()
    for header in _INCLUDE.findall(text):
        found.update(_with_headers(header))
    found[name] = _INCLUDE.sub("", text).replace("#pragma once\n", "")
    return tuple(found.items())
