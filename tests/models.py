"""Small models and images that several tests share."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

import ouro_compiler as ouro
from ouro_compiler.config import QuantConfig
from ouro_compiler.models.vim import Vim, vim_micro
from ouro_compiler.runtime.compiled_model import CompiledModel


@lru_cache(maxsize=4)
def small_vim(depth: int = 1) -> Vim:
    """A micro Vim with fixed random weights, outliers included."""
    torch.manual_seed(depth)
    model = vim_micro(depth=depth).eval().requires_grad_(False)
    for layer in model.layers:
        layer.norm.weight[::16] = 6.0  # a few channels far above the others
    return model


@lru_cache(maxsize=4)
def images(count: int = 16, seed: int = 0) -> Tensor:
    """Normal noise (count, 1, 28, 28)."""
    return torch.randn(count, 1, 28, 28, generator=torch.Generator().manual_seed(seed))


@lru_cache(maxsize=16)
def compiled_vim(config: QuantConfig = ouro.W4A4, depth: int = 1) -> CompiledModel:
    """small_vim compiled on 16 noise images."""
    return ouro.compile(small_vim(depth), images(2), config, calibration=images())
