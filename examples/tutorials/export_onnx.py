"""Take a compiled model elsewhere: an ONNX file that plain ONNX Runtime runs.

The command is `ouro export-onnx model.pt2 -o model.onnx`; it needs `pip install '.[onnx]'`.
"""

import tempfile
from pathlib import Path

import onnxruntime
import torch

import ouro_compiler as ouro
from ouro_compiler.data import open_images
from ouro_compiler.export import export_onnx
from ouro_compiler.frontend.checkpoint import load_model

EXAMPLES = Path(__file__).parent.parent

loaded = load_model(EXAMPLES / "mambavision_digits.safetensors")
images = open_images(EXAMPLES / "digits_calibration.npz", loaded.preprocessing, limit=32)
compiled = ouro.compile(loaded.module, loaded.example, ouro.W8A8, calibration=images)

with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "model.onnx"
    exported = export_onnx(compiled, file)  # compared with `compiled` before the file appears
    print(f"SNR of ONNX Runtime's logits against ours: {exported.snr_db:.0f} dB")
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    batch = next(images.batches(8))
    logits = session.run(None, {session.get_inputs()[0].name: batch.numpy()})[0]

same = torch.from_numpy(logits).argmax(1) == compiled(batch).argmax(1)
print(f"same class: {int(same.sum())} of {len(batch)}")
