"""The trained examples: each opens, and classifies as well as examples/README.md says."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from ouro_compiler.frontend.checkpoint import load_model

EXAMPLES = Path(__file__).parent.parent / "examples"
WEIGHTS = sorted(EXAMPLES.glob("*_digits.safetensors"))
IMAGES = 250
TOLERANCE = 1.0  # percent: they are a quarter of those that the stated accuracy is of


@pytest.mark.parametrize("path", WEIGHTS, ids=lambda path: path.stem)
def test_accuracy_is_what_the_readme_says(path: Path) -> None:
    loaded = load_model(path)
    assert isinstance(loaded.module, torch.nn.Module)
    assert loaded.name == path.stem.replace("_digits", "_micro")
    assert (loaded.preprocessing.mean, loaded.preprocessing.std) == ((0.1307,), (0.3081,))
    held_out = np.load(EXAMPLES / "digits_test.npz")
    images = torch.from_numpy(held_out["images"][:IMAGES])
    with torch.no_grad():
        predicted = loaded.module(images).argmax(1).numpy()
    correct = 100 * float((predicted == held_out["labels"][:IMAGES]).mean())
    stated = re.search(rf"`{path.name}`.*?([\d.]+) %", (EXAMPLES / "README.md").read_text())
    assert stated is not None
    assert abs(correct - float(stated[1])) <= TOLERANCE


def test_there_are_examples_of_two_families() -> None:
    assert {"vim_digits", "vmamba_digits"} <= {path.stem for path in WEIGHTS}
