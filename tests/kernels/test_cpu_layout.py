"""The four orders of a map in generated C++, and their sum: the references' bits."""

from __future__ import annotations

import pytest
import torch

from ouro_compiler.kernels.cpp import layout
from ouro_compiler.ops.cross_scan import cross_merge_ref, cross_scan_ref
from tests.helpers import randn
from tests.kernels.inputs import assert_equal

pytestmark = pytest.mark.usefixtures("poisoned")
SIZES = [(1, 1, 1, 1), (2, 3, 1, 5), (2, 3, 4, 1), (1, 5, 7, 9), (2, 4, 16, 16)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
def test_orders_and_their_sum(size: tuple[int, ...], dtype: torch.dtype) -> None:
    x = randn(1, *size).to(dtype)
    _, _, height, width = size
    channels_last = x.to(memory_format=torch.channels_last)
    for value in (x, channels_last, x.flip(1)[:, ::2], x.mT.contiguous().mT):
        assert_equal((layout.cross_scan(value),), (cross_scan_ref(value),))
    orders = randn(2, size[0], 4, size[1], height * width).to(dtype)
    for value in (orders, orders.mT.contiguous().mT):
        found, expected = (f(value, height, width) for f in (layout.cross_merge, cross_merge_ref))
        assert_equal((found,), (expected,))
        assert found.is_contiguous()


def test_threads_do_not_matter() -> None:
    x = randn(1, 2, 32, 24, 20)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        orders = layout.cross_scan(x)
        assert_equal((orders,), (cross_scan_ref(x),))
        assert_equal((layout.cross_merge(orders, 24, 20),), (cross_merge_ref(orders, 24, 20),))
    finally:
        torch.set_num_threads(before)


def test_what_is_no_map_is_refused() -> None:
    with pytest.raises(ValueError, match="must be"):
        layout.cross_scan(randn(1, 2, 3, 4)[0])
    for height, width in ((3, 4), (-2, -3), (0, 6)):
        with pytest.raises(ValueError, match="are no map"):
            layout.cross_merge(randn(1, 1, 4, 2, 6), height, width)
    assert "bytes" in str(layout.refuse_cross_scan(torch.zeros(1, 1, 1, 1, dtype=torch.complex128)))
    assert "float64" in str(layout.refuse_cross_merge(torch.zeros(1).double(), 1, 1))
