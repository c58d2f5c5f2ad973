"""Compile the digits model to 4 bits, save it, load it, and count what it gets right."""

import tempfile
from pathlib import Path

import torch

import ouro_compiler as ouro
from ouro_compiler.data import open_images
from ouro_compiler.evaluation import accuracy
from ouro_compiler.frontend.checkpoint import load_model

EXAMPLES = Path(__file__).parent.parent

loaded = load_model(EXAMPLES / "vim_digits.safetensors")  # its tensors say what it is
images = open_images(EXAMPLES / "digits_calibration.npz", loaded.preprocessing, limit=32)
compiled = ouro.compile(
    loaded.module,
    loaded.example,
    ouro.W4A4,
    calibration=images,
    preprocessing=loaded.preprocessing,
)

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "digits.pt2"
    compiled.save(path)
    print(f"file: {path.stat().st_size} bytes")
    again = ouro.load(path)

test = open_images(EXAMPLES / "digits_test.npz", loaded.preprocessing, limit=200)
batch = next(test.batches(200))
with torch.no_grad():
    before, after = loaded.module(batch), again(batch)
print(f"accuracy: {accuracy(before, test.labels):.3f} -> {accuracy(after, test.labels):.3f}")
print(compiled.report.table("summary"))
