"""The tutorials run, say what they promise, and are all on the page."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TUTORIALS = ROOT / "examples" / "tutorials"


def said(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sys, "argv", [name])
    runpy.run_path(str(TUTORIALS / name), run_name="__main__")
    return capsys.readouterr().out


EXPECTED = {
    "compile_model.py": ("file: ", "accuracy: 0.9", "32 of 42 quantized"),
    "calibrate.py": ("noise: ", "synthetic: ", "% of 100"),
    "inspect_model.py": (
        "layers.0.mixer.in_proj.input",
        "fuse_quantize_prologue: {",
        "the largest error is in layers.",
        "page: ",
    ),
    "export_onnx.py": ("SNR of ONNX Runtime's logits against ours: ", "same class: 8 of 8"),
    "own_model.py": ("blocks.0.1", "SNR of the logits: "),
    "own_pass.py": (
        "changed by: ['drop_added_zeros']",
        "again: []",
        "nodes: 6 -> 4",
        "same outputs: True",
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_tutorial_runs(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = said(name, capsys, monkeypatch)
    for words in EXPECTED[name]:
        assert words in text, text


def test_tutorials_are_on_the_page() -> None:
    page = (ROOT / "docs" / "tutorials.md").read_text()
    for path in TUTORIALS.glob("*.py"):
        assert f'--8<-- "examples/tutorials/{path.name}"' in page
        assert f"| `{path.name}` |" in page
