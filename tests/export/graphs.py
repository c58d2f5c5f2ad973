"""Modules as ONNX models in onnxruntime, with the codes of quantizers visible."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, fx, nn

from ouro_compiler.export.model import to_onnx
from ouro_compiler.export.onnx import check_model, session
from ouro_compiler.frontend.capture import export
from ouro_compiler.graph import is_op
from ouro_compiler.ops import QUANTIZERS


def graph_of(module: nn.Module, example: Tensor) -> fx.GraphModule:
    """A module's graph with a dynamic batch."""
    gm = export(module.eval(), example).module(check_guards=False)
    assert isinstance(gm, fx.GraphModule)
    return gm


def onnx_of(
    module: nn.Module, example: Tensor, *, opset: int = 21, scan: Any = "scan"
) -> onnx.ModelProto:
    """The checked ONNX model of a module. Quantizers' results are uint8 codes and bool lists."""
    gm = graph_of(module, example)
    for node in gm.graph.nodes:
        if node.op == "call_function" and is_op(node.args and node.args[0], *QUANTIZERS):
            codes = node.args[0].meta["val"][0]
            if node.args[1] == 0:
                node.meta["val"] = codes.to(torch.uint8)
            elif node.args[1] == 2:
                node.meta["val"] = codes.to(torch.bool)
    proto = to_onnx(gm, opset=opset, scan=scan, metadata={})
    check_model(proto)
    return proto


def run(proto: onnx.ModelProto, x: Tensor) -> list[np.ndarray]:
    """Every output, with all of onnxruntime's optimisations."""
    opened = session(proto.SerializeToString(), 1)
    return opened.run(None, {opened.get_inputs()[0].name: x.numpy()})


def operators(proto: onnx.ModelProto) -> list[str]:
    """Every operator, bodies of functions and of scans included."""
    found: list[str] = []
    for function in proto.functions:
        found += _types(function.node)
    return found + _types(proto.graph.node)


def _types(nodes: Any) -> list[str]:
    found = []
    for node in nodes:
        found.append(node.op_type)
        for attribute in node.attribute:
            found += _types(attribute.g.node)
    return found
