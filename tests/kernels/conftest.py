"""Where kernel cases run: interpreted on the CPU (TRITON_INTERPRET=1), else on a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture
def device() -> str:
    return "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


@pytest.fixture(scope="module")
def empty_caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Our cache and Triton's, of a module alone; returns the folder of both."""
    import triton

    folder = tmp_path_factory.mktemp("caches")
    with pytest.MonkeyPatch.context() as patch, triton.knobs.cache.scope():
        patch.setenv("OURO_CACHE_DIR", str(folder / "ouro"))
        triton.knobs.cache.dir = str(folder / "triton")
        yield folder


@pytest.fixture
def poisoned() -> Iterator[None]:
    """`torch.empty` gives NaN (and the largest integers): what a kernel does not write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    filling = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)
    torch.utils.deterministic.fill_uninitialized_memory = filling
