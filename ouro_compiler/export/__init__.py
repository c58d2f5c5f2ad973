"""Models in other formats: ONNX (docs/onnx.md)."""

from ouro_compiler.export.onnx import Exported, export_onnx

__all__ = ["Exported", "export_onnx"]
