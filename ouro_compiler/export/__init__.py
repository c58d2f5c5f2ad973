"""Models in other formats: ONNX (docs/onnx.md)."""

from ouro_compiler.export.onnx import Exported, check_options, export_onnx

__all__ = ["Exported", "check_options", "export_onnx"]
