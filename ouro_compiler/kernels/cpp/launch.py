"""Calling generated C++ with tensors, or recording what would be called."""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ouro_compiler.kernels.cpp.source import generate
from ouro_compiler.kernels.cpp.toolchain import BuildError, build, find_toolchain
from ouro_compiler.kernels.launch import Launch, current_recording, places
from ouro_compiler.kernels.spec import KernelSpec, Template, make_spec

NO_COMPILER = "no C++ compiler was found: install g++ or clang++, or set CXX"
# Codes of dtypes in constants and arguments; templates/memory.h has the same.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

Function = Callable[[Any, int], None]  # (words, threads)
_INTEGERS = {int, bool}
_functions: dict[KernelSpec, Function] = {}
_failures: dict[KernelSpec, str] = {}
_checks: dict[Template, Callable[[KernelSpec], None]] = {}


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

    Arguments are tensors, None for a null pointer, integers and floats.
    """
    recording = current_recording()
    if recording is not None:
        recording.launches.append(Launch(spec=spec, grid=(1, 1, 1), args=args))
        return
    function = _functions.get(spec) or load_function(spec)
    function(words(args), torch.get_num_threads())


def words(args: tuple[Any, ...], address: Callable[[Tensor], int] = Tensor.data_ptr) -> Any:
    """Arguments as an array of 64-bit words, for the function of a kernel."""
    # Asking for plain types is much faster than isinstance(arg, Tensor): this runs for every node.
    found = [
        arg
        if type(arg) in _INTEGERS
        else 0
        if arg is None
        else struct.unpack("q", struct.pack("d", arg))[0]
        if type(arg) is float
        else address(arg)
        for arg in args
    ]
    return (ctypes.c_int64 * len(found))(*found)


def strides(x: Tensor) -> tuple[int, int, int, int]:
    """Of tokens (B, L, K) or a map (B, H, W, K): of a sample; W, or L; of a row, of a token."""
    at = places(x)
    return (at.sample, at.width or x.shape[1], at.row or 0, at.token)


def check_at_first_use(template: Template, check: Callable[[KernelSpec], None]) -> None:
    """Run `check` on every kernel of a template once it is loaded; it may raise BuildError."""
    _checks[template] = check


def load_function(spec: KernelSpec) -> Function:
    """The compiled function of a spec. Raises BuildError; a failure is remembered."""
    if spec in _functions:
        return _functions[spec]
    if spec in _failures:
        raise BuildError(_failures[spec])
    toolchain = find_toolchain()
    try:
        if toolchain is None:
            raise BuildError(NO_COMPILER)
        _functions[spec] = _open(build(generate(spec), toolchain))
        if spec.template in _checks:
            _checks[spec.template](spec)
    except BuildError as error:
        _functions.pop(spec, None)
        _failures[spec] = str(error)
        raise
    return _functions[spec]


def _open(path: Path) -> Function:
    try:
        function = ctypes.CDLL(str(path)).call
    except (OSError, AttributeError) as error:
        raise BuildError(f"the compiled kernel cannot be loaded: {error}") from error
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_int64], None
    return function
