"""What `import timm` needs of torchvision, where no torchvision fits the torch that is installed.

timm imports torchvision for data loading and for a few models; the models tested here use none of
it. Every name of the stub can be imported, and refuses to be called.
"""

from __future__ import annotations

import enum
import importlib.machinery
import importlib.util
import sys
import types
from typing import Any

from torch import nn


class InterpolationMode(enum.Enum):
    """timm makes tables of these when it is imported."""

    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


class _AnyAttribute(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls


class Missing(metaclass=_AnyAttribute):
    """Any other class or function of torchvision."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("torchvision is not installed")


class _Module(types.ModuleType):
    __path__: list[str] = []  # noqa: RUF012  (a package without files)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Missing


_MODULES = (
    "torchvision",
    "torchvision.datasets",
    "torchvision.models",
    "torchvision.models.feature_extraction",
    "torchvision.ops",
    "torchvision.ops.misc",
    "torchvision.transforms",
    "torchvision.transforms.functional",
    "torchvision.utils",
)


def install_torchvision_stub() -> None:
    """Put the stub into sys.modules, unless torchvision is installed."""
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is not None:
        return
    for name in _MODULES:
        module = _Module(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        sys.modules[name] = module
        parent, _, leaf = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], leaf, module)
    vars(sys.modules["torchvision"])["__version__"] = "0.0"
    for name in ("torchvision.transforms", "torchvision.transforms.functional"):
        vars(sys.modules[name])["InterpolationMode"] = InterpolationMode
    for name in ("torchvision.ops", "torchvision.ops.misc"):
        vars(sys.modules[name])["FrozenBatchNorm2d"] = nn.BatchNorm2d
