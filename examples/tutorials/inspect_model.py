"""Look at what was compiled: tables of the report, what passes did, errors of layers, the page.

The same page comes from `ouro inspect examples/vim_digits.safetensors --html page.html`.
"""

import sys
from itertools import pairwise
from pathlib import Path

import ouro_compiler as ouro
from ouro_compiler.data import open_images
from ouro_compiler.frontend.checkpoint import load_model
from ouro_compiler.inspection import diff
from ouro_compiler.inspection.page import PageContent, render_page
from ouro_compiler.inspection.probe import measure
from ouro_compiler.inspection.stages import StageRecorder

EXAMPLES = Path(__file__).parent.parent

loaded = load_model(EXAMPLES / "vim_digits.safetensors")
images = open_images(EXAMPLES / "digits_calibration.npz", loaded.preprocessing, limit=8)
recorder = StageRecorder(keep="share_views")  # the last normalising pass
compiled = ouro.compile(loaded.module, loaded.example, calibration=images, on_pass=recorder)

print(compiled.report.table("sites"))  # rich.print(compiled.report) and notebooks show all

for before, after in pairwise(recorder.stages):
    if after.changed:
        print(f"{after.name}: {diff(before.network, after.network).ops}")

# Two compiled models, or reports, are compared the same way: print(diff(compiled, other)).

sample = measure(compiled.graph_module, images.batches(8), recorder.kept)
worst = min(sample.snr_db, key=sample.snr_db.__getitem__)
print(f"the largest error is in {worst}: {sample.snr_db[worst]:.1f} dB")

content = PageContent(
    title="digits",
    stages=recorder.stages,
    stage_note="Every pass, up to the last.",
    report=compiled.report,
    sample=sample,
)
page = render_page(content)
if len(sys.argv) > 1:
    Path(sys.argv[1]).write_text(page, encoding="utf-8")
print(f"page: {len(page)} characters")
