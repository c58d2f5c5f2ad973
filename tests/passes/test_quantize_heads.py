"""Heads whose weight alone is quantized: what is stored, what is computed, what is refused."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

import ouro_compiler as ouro
from ouro_compiler.config import PRESETS, QuantConfig
from ouro_compiler.errors import UsageError
from ouro_compiler.evaluation import snr_db
from ouro_compiler.graph import constant_names
from ouro_compiler.ops.linear import dequantize_weight_ref
from tests.models import compiled_vim, images, small_vim


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_logits_are_those_of_the_dequantized_weight(bits: int) -> None:
    compiled = compiled_vim(ouro.W4A4.with_setting(f"head_bits={bits}"))
    stored = dict(compiled.graph_module.named_buffers())
    weight = small_vim().head.weight
    codes, scale = stored["head.qweight"], stored["head.weight_scale"]
    assert codes.dtype == (torch.uint8 if bits == 4 else torch.int8)
    assert codes.shape == (weight.shape[0], weight.shape[1] // (2 if bits == 4 else 1))
    assert "head.weight" not in constant_names(compiled.graph_module)
    other = copy.deepcopy(small_vim())
    other.head.weight.copy_(dequantize_weight_ref(codes, scale, None, bits, weight.shape[1]))
    error = (other.head.weight - weight).norm() / weight.norm()
    assert 0 < error < 1 / 2 ** (bits - 1)
    expected = ouro.compile(other, images(2), ouro.W4A4, calibration=images())
    batch = images(3, seed=5)
    assert snr_db(expected(batch), compiled(batch)) > 60  # theirs is stored in fp16
    (row,) = [row for row in compiled.report["layers"]["rows"] if row["name"] == "head"]
    assert (row["status"], row["weight_bits"], row["activation_bits"]) == ("simulated", bits, None)
    heads = compiled.report["bytes"]["by_part"]["heads"]
    assert heads["stored"] < heads["fp16"] * (bits + 4) / 16


def test_heads_stay_as_they_are() -> None:
    """By default, where they are excluded, and in recipes that ask for no head."""
    for config in (ouro.W4A4, dataclasses.replace(PRESETS["w4a4"], head_bits=4, exclude=("head",))):
        compiled = compiled_vim(config)
        assert "head.weight" in constant_names(compiled.graph_module)
        (row,) = [row for row in compiled.report["layers"]["rows"] if row["name"] == "head"]
        assert row["status"] == "skipped"


def test_bits_that_are_none() -> None:
    with pytest.raises(UsageError, match=r"head_bits must be one of \(4, 6, 8\) or none, got 3"):
        QuantConfig(head_bits=3)
    assert QuantConfig(head_bits=4).with_setting("head_bits=none").head_bits is None
