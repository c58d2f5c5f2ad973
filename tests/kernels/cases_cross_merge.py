"""The merge with norm and quantizer: values by tolerance, codes exactly those of the values."""

from __future__ import annotations

import pytest
import torch

from ouro_compiler.kernels.cross_merge import cross_merge_norm_quantize
from ouro_compiler.ops.fused import cross_merge_norm_quantize_ref
from ouro_compiler.ops.quantize import quantize_dynamic_outlier_ref
from tests.helpers import assert_close
from tests.kernels.inputs import assert_equal, on
from tests.kernels.test_cpu_cross_merge import DTYPES, ROUNDING, orders, randn, vectors

pytestmark = pytest.mark.usefixtures("poisoned")
# (channels, height, width, second orders)
CASES = [
    (40, 3, 5, (True, True)),
    (16, 5, 2, (False, True)),
    (33, 1, 7, (True, False)),
    (24, 4, 1, (False, False)),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index", range(len(CASES)))
def test_cross_merge_norm_quantize(index: int, dtype: torch.dtype, device: str) -> None:
    channels, height, width, back = CASES[index]
    found = orders((2, channels, height * width), back, dtype=dtype)
    if index == 0:  # copied
        found[0] = None if found[0] is None else found[0].contiguous()
    scale, threshold = vectors(height * width)
    bias = randn(8, channels) if index % 2 else None
    static = ((4, 8)[index % 2], (8, 16)[index // 2], 4, index % 2 == 0)
    front = (*found, height, width, randn(7, channels), bias, 1e-5, index % 3 == 1)
    got = cross_merge_norm_quantize(*on(device, *front, scale, threshold), *static, True)
    expected = cross_merge_norm_quantize_ref(*front, scale, threshold, *static, True)
    assert got[3].stride() == expected[3].stride()
    assert_close(got[3].cpu(), expected[3], ROUNDING[dtype])
    codes = quantize_dynamic_outlier_ref(got[3].cpu(), scale, None, threshold, *static)
    assert_equal(got[:3], codes)
    silent = cross_merge_norm_quantize(*on(device, *front, scale, threshold), *static, False)
    assert silent[3].shape == (0,)
    assert_equal(silent[:3], codes)
