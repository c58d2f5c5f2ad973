"""The four orders of a map in C++, and their sum: their arguments."""

from __future__ import annotations

from torch import Tensor

from ouro_compiler.kernels.cpp.launch import (
    NO_COMPILER,
    dtype_code,
    launch,
    refuse_dtypes,
    spec_of,
)
from ouro_compiler.kernels.cpp.toolchain import find_toolchain
from ouro_compiler.kernels.launch import contiguous
from ouro_compiler.kernels.spec import Template
from ouro_compiler.ops.cross_scan import ORDERS, check_merge, check_scan


def refuse_cross_scan(x: Tensor) -> str | None:
    """Why no kernel moves elements of x; None if one does."""
    if x.element_size() not in (1, 2, 4, 8):
        return f"kernels move elements of 1, 2, 4 or 8 bytes, not {x.dtype}"
    return NO_COMPILER if find_toolchain() is None else None


def refuse_cross_merge(y: Tensor, height: int, width: int) -> str | None:
    """Why no kernel adds up these orders; None if one does."""
    return refuse_dtypes(y)


def cross_scan(x: Tensor) -> Tensor:
    """`cross_scan_ref` in C++: (B, C, H, W) -> (B, 4, C, H*W)."""
    check_scan(x)
    batch, channels, height, width = x.shape
    orders = x.new_empty((batch, ORDERS, channels, height * width))
    spec = spec_of(Template.CROSS_SCAN, BYTES=x.element_size())
    launch(spec, x, *x.stride(), orders, batch, channels, height, width)
    return orders


def cross_merge(y: Tensor, height: int, width: int) -> Tensor:
    """`cross_merge_ref` in C++: (B, 4, C, height * width) -> (B, C, height * width)."""
    check_merge(y, height, width)
    batch, _, channels, length = y.shape
    merged = y.new_empty((batch, channels, length))
    spec = spec_of(Template.CROSS_MERGE, DTYPE=dtype_code(y))
    launch(spec, contiguous(y, "y"), merged, batch, channels, height, width)
    return merged
