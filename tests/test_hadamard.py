"""Hadamard matrices by what defines them, and the rotation that cancels."""

from __future__ import annotations

import pytest
import torch

from ouro_compiler.calibration.hadamard import hadamard
from ouro_compiler.recipes.quamba import rotation_of, undone
from tests.helpers import randn

# Orders of scans: Vim-T/S/B, the examples, VMamba, MambaVision-T and -B.
WIDTHS = (96, 128, 160, 192, 256, 320, 384, 512, 640, 768, 1024, 1536)


@pytest.mark.parametrize("order", [1, 2, 4, 8, 12, 20, 24, 28, 36, 40, 44, 60, 76, *WIDTHS])
def test_rows_are_orthogonal(order: int) -> None:
    matrix = hadamard(order)
    assert matrix is not None
    assert matrix.shape == (order, order)
    assert bool((matrix.abs() == 1).all())
    assert torch.equal(matrix @ matrix.t(), order * torch.eye(order))


def test_orders_that_are_not_constructed() -> None:
    """All that are no multiple of 4, and the eight that the docstring names."""
    missing = [order for order in range(1, 201) if hadamard(order) is None]
    others = [order for order in missing if order % 4 == 0]
    assert others == [52, 92, 100, 116, 156, 172, 184, 188]
    assert [one for one in missing if one % 4] == [n for n in range(3, 201) if n % 4]
    assert rotation_of(100) is None


@pytest.mark.parametrize("order", [12, 20, 96, 384])
def test_a_rotated_weight_cancels_the_rotation(order: int) -> None:
    """METHODS 9: y W = (y H)(H^-1 W), with entries that fp16 holds."""
    rotation = rotation_of(order)
    assert rotation is not None
    assert torch.equal(rotation.half().float(), rotation)
    weight, x = randn(0, 7, order), randn(1, 5, order)
    x[:, 3] *= 50
    rotated = x @ rotation.t()
    expected = x @ weight.t()
    torch.testing.assert_close(
        rotated @ undone(weight, rotation).t(), expected, rtol=1e-4, atol=1e-4 * 50
    )
    spread = rotated.abs().amax() / rotated.abs().mean()
    assert spread < 0.5 * x.abs().amax() / x.abs().mean()  # what it is for
