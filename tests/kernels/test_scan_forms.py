"""Which form of a scan runs: what its bits depend on comes from the shape alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ouro_compiler.kernels.blocks import multiprocessors, scan_blocks, scan_chunk
from tests.helpers import REPEATABLE

H100 = 132
ORDER = ("LANES", "CHUNK")  # of sums: what bits follow from


@REPEATABLE
@given(
    st.integers(1, 3000),
    st.integers(1, 64),
    st.integers(1, 5000),
    st.integers(1, 10_000),
    st.integers(1, 200),
)
def test_forms_of_a_shape(
    channels: int, states: int, length: int, scans: int, processors: int
) -> None:
    found = scan_blocks(channels, states, length, scans, processors)
    busy, idle = (scan_blocks(channels, states, length, 1, count) for count in (0, 10**9))
    assert {name: found[name] for name in ORDER} == {name: busy[name] for name in ORDER}
    assert found in (busy, idle)
    assert busy["SPLIT"] == 0
    assert busy["SHARE"] == (1 if states <= 32 else 4)
    assert idle["SPLIT"] or idle["SHARE"] == idle["LANES"]
    for form in (busy, idle):
        assert form["BLOCK_D"] * form["SHARE"] <= 32
        assert 1 <= form["STEPS"] <= form["CHUNK"] <= length
        if form["CHUNK"] < length:
            assert length % form["CHUNK"] == 0 == form["CHUNK"] % form["STEPS"]
            assert (form["SHARE"], form["LANES"] >= states) == (1, True)
        else:
            assert form["SPLIT"] == 0


@pytest.mark.parametrize(
    ("length", "states", "chunk"),
    [
        (3136, 1, 28),
        (784, 1, 16),
        (196, 1, 196),  # short
        (3136, 16, 3136),  # a second state of sixteen is too much
        (12544, 4, 56),
        (57 * 57, 1, 57),
        (3137, 1, 3137),  # a prime
    ],
)
def test_chunks(length: int, states: int, chunk: int) -> None:
    assert scan_chunk(length, states) == chunk


def test_vim_and_vmamba() -> None:
    one, many = (scan_blocks(384, 16, 197, batch, H100) for batch in (1, 32))
    assert one == {"LANES": 4, "SHARE": 4, "STEPS": 4, "BLOCK_D": 8, "CHUNK": 197, "SPLIT": 0}
    assert many == {"LANES": 4, "SHARE": 1, "STEPS": 1, "BLOCK_D": 32, "CHUNK": 197, "SPLIT": 0}
    one, many = (scan_blocks(96, 1, 3136, batch, H100) for batch in (1, 32))
    assert one == {"LANES": 1, "SHARE": 1, "STEPS": 4, "BLOCK_D": 32, "CHUNK": 28, "SPLIT": 1}
    assert many == {**one, "SPLIT": 0}


def test_chunks_that_no_grid_holds_go_one_after_the_other() -> None:
    length = 2**20
    assert scan_blocks(96, 1, length, 1, H100)["SPLIT"] == 1
    wide = scan_blocks(96 * 64, 1, length, 1, 10**6)
    assert wide["SPLIT"] == 0
    assert wide["CHUNK"] == scan_chunk(length, 1)


def test_multiprocessors_without_a_gpu() -> None:
    assert multiprocessors(torch.device("cpu")) == H100
