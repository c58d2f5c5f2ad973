"""`ouro export-onnx`: artefacts and models, what it prints, its exit codes."""

from __future__ import annotations

from pathlib import Path

import onnx

from ouro_compiler.cli import main
from tests.command_line import Cli, cli, refused  # noqa: F401
from tests.models import compiled_vim


def test_a_model_and_an_artefact(cli: Cli) -> None:  # noqa: F811
    found = cli("export-onnx", "vim.safetensors", "-o", "float.onnx", entry=main)
    assert (found.code, found.err) == (0, "")
    assert "as Scan" in found.out
    assert "SNR" in found.out
    assert "MatMulInteger" not in found.out
    assert found.out.endswith("\nfloat.onnx\n")
    compiled_vim().save("vim.pt2")
    found = cli("export-onnx", "vim.pt2", "-o", "int.onnx", "--no-verify", entry=main)
    assert found.code == 0, found.err
    assert "MatMulInteger" in found.out
    assert "not compared" in found.out
    assert Path("int.onnx").stat().st_size < Path("float.onnx").stat().st_size
    onnx.checker.check_model("int.onnx", full_check=True)
    found = cli("export-onnx", "vim.pt2", "-o", "int.onnx", "--ema", entry=main)
    assert found.code == 2
    assert "vim.pt2 is compiled already" in found.err


def test_refusals(cli: Cli) -> None:  # noqa: F811
    given = ("export-onnx", "vim.safetensors", "-o")
    refused(cli(*given, "m.onnx", "--opset", "9", entry=main), 2, "--opset takes 18 to 24, got 9")
    refused(cli(*given, "nowhere/m.onnx", entry=main), 2, "not a file in an existing folder")
    refused(cli("export-onnx", "none.pth", "-o", "m.onnx", entry=main), 3, "none.pth")
    assert not list(Path().glob("*.onnx"))
