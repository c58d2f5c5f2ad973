"""Artefacts: same input, same bytes; same numbers in a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import ouro_compiler as ouro
from ouro_compiler.errors import DeviceError, ModelError
from ouro_compiler.runtime.artifact import is_artifact
from ouro_compiler.runtime.compiled_model import resolve_device
from tests.models import compiled_vim, images, small_vim

LOAD = """
import sys
import torch
import ouro_compiler
model = ouro_compiler.load(sys.argv[1])
torch.set_num_threads(int(sys.argv[4]))
torch.save(model(torch.load(sys.argv[2])), sys.argv[3])
print(sorted({"typer", "rich", "onnx"} & set(sys.modules)))
"""


def test_fresh_process_gives_the_same_bits(tmp_path: Path) -> None:
    model = compiled_vim()
    model.save(tmp_path / "m.pt2")
    torch.save(images(4, seed=5), tmp_path / "x.pt")
    threads = str(torch.get_num_threads())
    command = [sys.executable, "-c", LOAD, *("m.pt2", "x.pt", "y.pt"), threads]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"
    assert torch.equal(torch.load(tmp_path / "y.pt"), model(images(4, seed=5)))


def test_same_input_same_bytes(tmp_path: Path) -> None:
    compiled_vim().save(tmp_path / "one.pt2")
    again = ouro.compile(small_vim(), images(2), ouro.W4A4, calibration=images())
    again.save(tmp_path / "another_name.pt2")
    assert (tmp_path / "one.pt2").read_bytes() == (tmp_path / "another_name.pt2").read_bytes()
    ouro.load(tmp_path / "one.pt2").save(tmp_path / "third.pt2")
    assert (tmp_path / "one.pt2").read_bytes() == (tmp_path / "third.pt2").read_bytes()


def test_manifest(tmp_path: Path) -> None:
    compiled_vim().save(tmp_path / "m.pt2")
    text = (tmp_path / "m.pt2").read_bytes()
    assert str(Path(ouro.__file__).parent).encode() not in text
    loaded = ouro.load(tmp_path / "m.pt2")
    assert loaded.manifest == compiled_vim().manifest
    assert loaded.manifest["torch_version"] == torch.__version__
    assert "seconds" not in loaded.report
    assert is_artifact(tmp_path / "m.pt2")


def rewrite(source: Path, target: Path, entry: str, change: object) -> None:
    """Copy an archive with one entry changed: `change` maps its bytes to new ones."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for item in old.infolist():
            data = old.read(item)
            if item.filename.endswith(entry):
                data = change(data)  # type: ignore[operator]
            new.writestr(item, data, zipfile.ZIP_STORED)


def edited_manifest(**changes: object) -> object:
    def change(data: bytes) -> bytes:
        return json.dumps({**json.loads(data), **changes}).encode()

    return change


def test_damaged_weights_are_noticed(tmp_path: Path) -> None:
    compiled_vim().save(tmp_path / "m.pt2")
    rewrite(
        tmp_path / "m.pt2",
        tmp_path / "bad.pt2",
        "data/weights/weight_0",
        lambda data: bytes([data[0] ^ 1]) + data[1:],
    )
    with pytest.raises(ModelError, match="damaged"):
        ouro.load(tmp_path / "bad.pt2")


def test_another_format_version_is_refused(tmp_path: Path) -> None:
    compiled_vim().save(tmp_path / "m.pt2")
    rewrite(tmp_path / "m.pt2", tmp_path / "f.pt2", "ouro.json", edited_manifest(format_version=99))
    with pytest.raises(ModelError, match="artefact format 99"):
        ouro.load(tmp_path / "f.pt2")


def test_another_torch_warns_and_compares(tmp_path: Path) -> None:
    compiled_vim().save(tmp_path / "m.pt2")
    changed = edited_manifest(torch_version="2.11.0")
    rewrite(tmp_path / "m.pt2", tmp_path / "t.pt2", "ouro.json", changed)
    with pytest.warns(UserWarning, match="gives the stored outputs"):
        ouro.load(tmp_path / "t.pt2")
    changed = edited_manifest(torch_version="2.11.0", checksum=[100.0] * 10)
    rewrite(tmp_path / "m.pt2", tmp_path / "u.pt2", "ouro.json", changed)
    with pytest.warns(UserWarning, match="DOES NOT"):
        ouro.load(tmp_path / "u.pt2")


def test_a_plain_exported_program_is_no_artefact(tmp_path: Path) -> None:
    program = torch.export.export(small_vim(), (images(2),))
    torch.export.save(program, tmp_path / "p.pt2")
    assert not is_artifact(tmp_path / "p.pt2")
    with pytest.raises(ModelError, match="no ouro artefact"):
        ouro.load(tmp_path / "p.pt2")
    (tmp_path / "text.pt2").write_text("hello")
    assert not is_artifact(tmp_path / "text.pt2")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is there")
def test_missing_device() -> None:
    with pytest.raises(DeviceError, match="no CUDA device"):
        resolve_device("cuda")
    with pytest.raises(DeviceError, match="not on"):
        resolve_device("meta")
