"""KernelSpec -> the text of one self-contained C++ file.

A template is C++ that names its constants; generating it puts their values in front and its headers
in place.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

from ouro_compiler.kernels.spec import KernelSpec

_TEMPLATES = Path(__file__).parent / "templates"
_INCLUDE = re.compile(r'^#include "(\w+\.h)"\n', re.MULTILINE)


def generate(spec: KernelSpec) -> str:
    """The source of a spec's kernel: one `extern "C"` function with the template's name."""
    constants = "".join(f"constexpr int {name} = {value};\n" for name, value in spec.constants)
    return f"// {spec.label}, generated from kernels/cpp/templates.\n{constants}" + "".join(
        text for _, text in _with_headers(f"{spec.template.value}.cpp")
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
