"""ouro_compiler: compile Vision Mamba models to 4 and 8 bits.

import ouro_compiler as ouro
compiled = ouro.compile(model, images[:1], ouro.W4A4)  # calibrated on images made from the model
compiled.save("model.pt2"); ouro.load("model.pt2")(images)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ouro_compiler.compiler import compile
    from ouro_compiler.config import PRESETS, W4A4, W4A8, W6A6, W8A8, QuantConfig, SynthesisSpec
    from ouro_compiler.frontend.standins import install_standins
    from ouro_compiler.runtime.artifact import load
    from ouro_compiler.runtime.compiled_model import CompiledModel
    from ouro_compiler.runtime.tune import tune

_HOMES = {
    "compile": "ouro_compiler.compiler",
    "load": "ouro_compiler.runtime.artifact",
    "install_standins": "ouro_compiler.frontend.standins",
    "CompiledModel": "ouro_compiler.runtime.compiled_model",
    "tune": "ouro_compiler.runtime.tune",
    **dict.fromkeys(
        ("PRESETS", "W4A4", "W4A8", "W6A6", "W8A8", "QuantConfig", "SynthesisSpec"),
        "ouro_compiler.config",
    ),
}
__all__ = [
    "PRESETS",
    "W4A4",
    "W4A8",
    "W6A6",
    "W8A8",
    "CompiledModel",
    "QuantConfig",
    "SynthesisSpec",
    "compile",
    "install_standins",
    "load",
    "tune",
]


def __getattr__(name: str) -> Any:
    """Public names are imported on first use, so that `import ouro_compiler` stays light."""
    if name not in _HOMES:
        raise AttributeError(f"module 'ouro_compiler' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
