"""What all tests share: `gpu` tests run where there is a GPU, `slow` ones when asked for."""

from __future__ import annotations

import os

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # a core each, before torch counts them
    os.environ["OMP_NUM_THREADS"] = "1"

import torch


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = set() if torch.cuda.is_available() else {"gpu"}
    if not config.option.markexpr:
        left_out.add("slow")  # python -m pytest -m slow
    deselected = [item for item in items if any(map(item.get_closest_marker, left_out))]
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if item not in deselected]
