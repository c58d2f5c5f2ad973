"""Kernels as implementations of `torch.ops.ouro.*` on one kind of device.

An operator's arguments either have a kernel or a reason why not; then the reference runs and a
warning says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ouro_compiler.kernels.cpp.toolchain import BuildError
from ouro_compiler.ops.library import LIBRARY


@dataclass(frozen=True)
class Implementation:
    """A kernel, the reference it replaces, and why it would not take some arguments (or None)."""

    kernel: Callable[..., Any]
    reference: Callable[..., Any]
    refuse: Callable[..., str | None]


_REGISTERED: dict[tuple[str, str], Callable[..., Any]] = {}


class ReferenceWarning(UserWarning):
    """An operator ran its reference where there should be a kernel, for the reason given."""


def _dispatching(name: str, found: Implementation) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        reason = found.refuse(*args, **kwargs)
        if reason is None:
            try:
                return found.kernel(*args, **kwargs)
            except BuildError as error:
                reason = str(error)
        warnings.warn(f"ouro::{name} runs its reference: {reason}", ReferenceWarning, stacklevel=2)
        return found.reference(*args, **kwargs)

    return run


def register(
    device: str,
    implementations: Mapping[str, Implementation],
    library: torch.library.Library = LIBRARY,
) -> None:
    """Register implementations for a dispatch key: "CUDA" or "CPU". The latest ones count."""
    for name, found in implementations.items():
        function = _dispatching(name, found)
        library.impl(name, function, device, allow_override=True)
        if library is LIBRARY:
            _REGISTERED[device, name] = function


def function_on(device: str, name: str) -> Callable[..., Any] | None:
    """What `torch.ops.ouro.<name>` calls on a device, to be called directly; None without one."""
    return _REGISTERED.get((device, name))
