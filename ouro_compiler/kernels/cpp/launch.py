"""Calling generated C++ with tensors, or recording what would be called."""

from __future__ import annotations

import ctypes
import functools
import re
from typing import Any

import torch
from torch import Tensor

from ouro_compiler.kernels.cpp.source import generate
from ouro_compiler.kernels.cpp.toolchain import BuildError, build, find_toolchain
from ouro_compiler.kernels.launch import Launch, current_recording
from ouro_compiler.kernels.spec import KernelSpec, Template, make_spec

NO_COMPILER = "no C++ compiler was found: install g++ or clang++, or set CXX"
# Codes of dtypes in constants and arguments; templates/memory.h has the same.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_PARAMETERS = {"int64_t": ctypes.c_int64, "float": ctypes.c_float, "double": ctypes.c_double}
_PLAIN = {int, bool, float, type(None)}
_functions: dict[KernelSpec, Any] = {}
_failures: dict[KernelSpec, str] = {}


def refuse_dtypes(*tensors: Tensor | None) -> str | None:
    """Why no kernel takes these floating-point tensors; None if one does."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype not in DTYPES:
            return f"kernels take fp32, bf16 and fp16, got {tensor.dtype}"
    return NO_COMPILER if find_toolchain() is None else None


def dtype_code(tensor: Tensor | None) -> int:
    """The code of a tensor's dtype; 0 without one."""
    return 0 if tensor is None else DTYPES[tensor.dtype]


@functools.cache
def spec_of(template: Template, **constants: int) -> KernelSpec:
    """make_spec, remembered: hosts ask for the same few specs at every call."""
    return make_spec(template, constants)


def launch(spec: KernelSpec, *args: Any) -> None:
    """Call a kernel, compiled at its first use, or record the call. Raises BuildError.

    Tensors are passed as addresses, None as a null pointer. The last parameter of every kernel is
    the number of threads it may use; it is added here.
    """
    recording = current_recording()
    if recording is not None:
        recording.launches.append(Launch(spec=spec, grid=(1, 1, 1), args=args))
        return
    function = _functions.get(spec) or _load(spec)
    # Asking for plain types is much faster than isinstance(arg, Tensor): this runs for every node.
    function(
        *[arg if type(arg) in _PLAIN else arg.data_ptr() for arg in args], torch.get_num_threads()
    )


def raise_build_error(spec: KernelSpec, problem: str) -> None:
    """Never launch a kernel again, for the reason given. Raises BuildError."""
    _functions.pop(spec, None)
    _failures[spec] = problem
    raise BuildError(problem)


def _load(spec: KernelSpec) -> Any:
    """The compiled function of a spec. Raises BuildError; a failure is remembered."""
    if spec in _failures:
        raise BuildError(_failures[spec])
    toolchain = find_toolchain()
    try:
        if toolchain is None:
            raise BuildError(NO_COMPILER)
        source = generate(spec)
        function = _open(build(source, toolchain), spec, source)
    except BuildError as error:
        _failures[spec] = str(error)
        raise
    return _functions.setdefault(spec, function)


def _open(path: Any, spec: KernelSpec, source: str) -> Any:
    try:
        function = getattr(ctypes.CDLL(str(path)), spec.template.value)
    except (OSError, AttributeError) as error:
        raise BuildError(f"the compiled kernel cannot be loaded: {error}") from error
    function.argtypes = _argument_types(source, spec.template.value)
    function.restype = None
    return function


def _argument_types(source: str, name: str) -> list[Any]:
    """ctypes of the parameters of `extern "C" void name(...)`."""
    match = re.search(rf'extern "C"[^(]*\b{name}\(([^)]*)\)', source)
    assert match is not None, f"{name} is not in its template"
    parameters = [part.strip() for part in match.group(1).split(",")]
    return [
        ctypes.c_void_p if "*" in part else _PARAMETERS[part.rpartition(" ")[0]]
        for part in parameters
    ]
