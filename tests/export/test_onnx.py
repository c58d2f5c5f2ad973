"""Whole models as ONNX files: the four families, floating point and quantized; what is refused."""

from __future__ import annotations

import json
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, fx, nn

import ouro_compiler as ouro
from ouro_compiler.errors import UsageError, VerificationError
from ouro_compiler.export import export_onnx
from ouro_compiler.export.onnx import runner
from ouro_compiler.frontend.capture import capture
from ouro_compiler.graph import is_op
from ouro_compiler.passes import NORMALIZE
from ouro_compiler.passes.base import PassContext, run_passes
from tests import test_mambavision, test_vit, test_vmamba
from tests.export.graphs import operators
from tests.helpers import assert_close, randn
from tests.models import compiled_vim, images, small_vim

# (a small model, its input) by family.
SIZES = {"vim": (1, 28), "vmamba": (3, 16), "mambavision": (3, 64), "vit": (3, 16)}
SMALL = {"vmamba": test_vmamba.SMALL, "mambavision": test_mambavision.SMALL, "vit": test_vit.SMALL}


@lru_cache
def _model(family: str) -> nn.Module:
    torch.manual_seed(0)
    if family == "vim":
        return small_vim()
    return SMALL[family].build().eval().requires_grad_(False)


def _images(family: str, count: int) -> Tensor:
    channels, side = SIZES[family]
    return randn(7, count, channels, side, side)


def _normalised(family: str) -> fx.GraphModule:
    gm = capture(_model(family), _images(family, 2))
    run_passes(gm, NORMALIZE, PassContext())
    return gm


def _scans(gm: fx.GraphModule) -> int:
    ops = torch.ops.ouro
    kinds = (ops.selective_scan.default, ops.selective_scan_dynamic_outlier.default)
    return sum(is_op(node, *kinds) for node in gm.graph.nodes)


@pytest.mark.parametrize("family", SIZES)
def test_floating_point(family: str, tmp_path: Path) -> None:
    gm = _normalised(family)
    made = export_onnx(gm, tmp_path / "m.onnx")
    assert made.difference is not None
    assert made.difference < 1e-5
    proto = onnx.load(tmp_path / "m.onnx")
    assert made.scans == _scans(gm) == operators(proto).count("Scan")
    assert (family == "vit") == (made.scans == 0)
    assert not {"Loop", "If"} & set(operators(proto))
    run = runner((tmp_path / "m.onnx").read_bytes())
    for count in (1, 5):  # against the module itself, at batches that nothing was made with
        batch = _images(family, count)
        assert_close(run(batch), _model(family)(batch), 1e-4)
    assert [one.name for one in tmp_path.iterdir()] == ["m.onnx"]


@pytest.mark.parametrize("config", ["w4a4", "w8a8"])
def test_quantized_vim(config: str, tmp_path: Path) -> None:
    compiled = compiled_vim(ouro.config.PRESETS[config])
    made = export_onnx(compiled, tmp_path / "m.onnx", images=images(4, seed=9))
    _check_quantized(compiled, made, tmp_path / "m.onnx")
    proto = onnx.load(tmp_path / "m.onnx")
    assert (made.four_bit_weights > 0) == (config == "w4a4")
    stored = {one.key: one.value for one in proto.metadata_props}
    assert json.loads(stored["ouro_config"]) == compiled.manifest["config"]
    assert stored["ouro_version"] == ouro.__version__
    assert not any("/" in value for value in stored.values())  # no paths
    halves = [one for one in proto.graph.initializer if one.data_type == onnx.TensorProto.FLOAT16]
    assert len(halves) > 10
    again = tmp_path / "again.onnx"
    export_onnx(compiled, again, verify=False)
    assert again.read_bytes() == (tmp_path / "m.onnx").read_bytes()


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("vit", "w4a4"),
        pytest.param("vit", "w8a8", marks=pytest.mark.slow),
        *(
            pytest.param(family, config, marks=pytest.mark.slow)
            for family in ("vmamba", "mambavision")
            for config in ("w4a4", "w8a8")
        ),
    ],
)
def test_quantized_families(family: str, config: str, tmp_path: Path) -> None:
    compiled = ouro.compile(
        _model(family),
        _images(family, 2),
        ouro.config.PRESETS[config],
        calibration=_images(family, 4),
    )
    made = export_onnx(compiled, tmp_path / "m.onnx")
    _check_quantized(compiled, made, tmp_path / "m.onnx")


def _check_quantized(compiled: Any, made: Any, path: Path) -> None:
    kinds = operators(onnx.load(path))
    assert kinds.count("Scan") == made.scans == _scans(compiled.graph_module)
    assert not {"Loop", "If", "LinearAttention"} & set(kinds)
    linears = [
        node
        for node in compiled.graph_module.graph.nodes
        if is_op(node, torch.ops.ouro.linear_dynamic_outlier.default)
    ]
    assert len(linears) <= made.integer_products <= 2 * len(linears)
    # Codes differ where fp32 values before a quantizer round to another side of a tie.
    assert made.snr_db > 30
    assert made.bytes < sum(tensor.numel() for tensor in compiled.program.state_dict.values()) * 8


def test_linear_attention_gives_the_same(tmp_path: Path) -> None:
    made = export_onnx(_normalised("vim"), tmp_path / "m.onnx", scan="contrib")
    kinds = operators(onnx.load(tmp_path / "m.onnx"))
    assert kinds.count("LinearAttention") == made.scans > 0
    assert "Scan" not in kinds
    assert made.difference is not None
    assert made.difference < 1e-5


@pytest.mark.parametrize("opset", [18, 24])
def test_other_opsets_give_the_same(opset: int, tmp_path: Path) -> None:
    results = []
    for number in (21, opset):
        made = export_onnx(compiled_vim(), tmp_path / "m.onnx", opset=number, verify=False)
        results.append(runner((tmp_path / "m.onnx").read_bytes())(images(4, seed=9)))
        assert (made.opset, made.snr_db) == (number, None)
    assert onnx.load(tmp_path / "m.onnx").opset_import[0].version == opset
    assert torch.equal(*results)


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_missing_package(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # importing it fails
    with pytest.raises(UsageError, match=rf"needs the package {package}: install ouro-compiler"):
        export_onnx(compiled_vim(), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


class _Other:
    """A compiled model whose outputs are not those of its graph."""

    def __init__(self) -> None:
        compiled = compiled_vim()
        self.graph_module, self.manifest = compiled.graph_module, compiled.manifest

    def __call__(self, batch: Tensor) -> Tensor:
        return torch.roll(self.graph_module(batch), 1, 0)


def test_outputs_that_differ_leave_no_file(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"before")
    with pytest.raises(VerificationError, match=r"SNR .* no file was written"):
        export_onnx(_Other(), path)
    assert path.read_bytes() == b"before"
    assert [one.name for one in tmp_path.iterdir()] == ["m.onnx"]


@pytest.mark.parametrize(
    ("options", "words"), [({"opset": 17}, "18 to 24"), ({"scan": "loop"}, "scan or contrib")]
)
def test_options_that_are_refused(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=words):
        export_onnx(compiled_vim(), tmp_path / "m.onnx", **options)
    assert not list(tmp_path.iterdir())
