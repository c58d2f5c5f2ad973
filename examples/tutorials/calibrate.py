"""What calibrates: real images, noise, or images made from the model (here two, and briefly)."""

from pathlib import Path

import ouro_compiler as ouro
from ouro_compiler.data import noise_images, open_images
from ouro_compiler.frontend.checkpoint import load_model

EXAMPLES = Path(__file__).parent.parent

loaded = load_model(EXAMPLES / "vim_digits.safetensors")
test = open_images(EXAMPLES / "digits_test.npz", loaded.preprocessing, limit=100)
# A folder or arrays of real images: open_images("...", loaded.preprocessing), as `test` is here.
sources = {
    "noise": noise_images(loaded.preprocessing, 16, seed=0),
    "synthetic": ouro.SynthesisSpec(images=2, iterations=1),  # 128 and 50 are the defaults
}
for name, source in sources.items():
    compiled = ouro.compile(
        loaded.module,
        loaded.example,
        calibration=source,
        preprocessing=loaded.preprocessing,
        verify=test,
        cache=False,
    )
    report = compiled.report
    share = report["accuracy"]["after"]
    print(f"{name}: {report['logits_snr_db']:.1f} dB, {100 * share:.0f} % of {len(test)}")
