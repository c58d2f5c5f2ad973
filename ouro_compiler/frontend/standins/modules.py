"""Modules that stand in for those missing on this machine, found by an import hook."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from types import ModuleType
from typing import Any

import torch

from ouro_compiler.frontend.standins.extensions import EXTENSIONS
from ouro_compiler.frontend.standins.norms import NORMS
from ouro_compiler.frontend.standins.refusals import refusing

# Triton kernels: they are missing wherever there is no CUDA device to run them.
_NORM_MODULES = ("mamba_ssm.ops.triton.layer_norm", "mamba_ssm.ops.triton.layernorm")
# Text generation and later Mambas: `mamba_ssm` imports them, Vision Mamba does not use them, and
# they fail to import without the transformers and huggingface_hub that they were written for.
_LANGUAGE = "language models are not supported"
_LATER = "it could not be imported, and only Mamba-1 is supported"
_OPTIONAL_MODULES: dict[str, dict[str, Any]] = {
    "mamba_ssm.utils.generation": {"GenerationMixin": type("GenerationMixin", (), {})},
    "mamba_ssm.utils.hf": {
        name: refusing(name, _LANGUAGE) for name in ("load_config_hf", "load_state_dict_hf")
    },
    "mamba_ssm.modules.mamba2": {"Mamba2": refusing("Mamba2", _LATER)},
    "mamba_ssm.modules.mamba3": {"Mamba3": refusing("Mamba3", _LATER)},
}


class _StandInLoader(Loader):
    """Fills a module with the names of a stand-in."""

    def __init__(self, contents: Mapping[str, Any]) -> None:
        self.contents = contents

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(self.contents)


class _SecondChoiceLoader(_StandInLoader):
    """Runs the real module, and fills in a stand-in's names only if that raises ImportError."""

    def __init__(self, real: Loader, contents: Mapping[str, Any]) -> None:
        super().__init__(contents)
        self.real = real

    def exec_module(self, module: ModuleType) -> None:
        try:
            self.real.exec_module(module)
        except ImportError:
            super().exec_module(module)


class StandInFinder(MetaPathFinder):
    """Finds the stand-ins: first on sys.meta_path, but silent where the real module works."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """A spec for a module that is stood in for, None for all others."""
        if fullname not in _NAMES:
            return None
        real = self._real_spec(fullname, path, target)
        if fullname in EXTENSIONS:
            if real is not None or not _parent_is_a_stand_in(fullname):
                return None
            loader: Loader = _StandInLoader(EXTENSIONS[fullname])
        elif real is None or real.loader is None:  # a package without such a module
            return None
        elif fullname in _NORM_MODULES:
            if norms_can_run():
                return None
            loader = _StandInLoader(NORMS)
        else:
            loader = _SecondChoiceLoader(real.loader, _OPTIONAL_MODULES[fullname])
        package = any(name.startswith(f"{fullname}.") for name in EXTENSIONS)
        return importlib.machinery.ModuleSpec(fullname, loader, is_package=package)

    def _real_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None
    ) -> importlib.machinery.ModuleSpec | None:
        for finder in sys.meta_path:
            if finder is not self and hasattr(finder, "find_spec"):
                spec = finder.find_spec(name, path, target)
                if spec is not None:
                    return spec
        return None


_NAMES = frozenset((*EXTENSIONS, *_NORM_MODULES, *_OPTIONAL_MODULES))


def _parent_is_a_stand_in(name: str) -> bool:
    """True for top-level names too: submodules are not added to a real package."""
    parent = name.rpartition(".")[0]
    return not parent or is_stand_in(sys.modules.get(parent))


def is_stand_in(module: ModuleType | None) -> bool:
    """Is this a module of this file's making?"""
    spec = getattr(module, "__spec__", None)
    return isinstance(getattr(spec, "loader", None), _StandInLoader)


def norms_can_run() -> bool:
    """Can Triton kernels run here?"""
    return torch.cuda.is_available() and importlib.util.find_spec("triton") is not None


def install_standins() -> tuple[str, ...]:
    """Let models be imported where CUDA extensions are missing; call it before importing them.

    From now on, for this process, importing one of mamba's or VMamba's extensions, of
    `causal_conv1d`, or without a CUDA device of mamba's Triton norms, gives a module of the same
    name on the ops of ouro_compiler. Real modules that are there are left alone. Inference only:
    training, last states and `inference_params` raise UsageError. May be called again. Returns the
    names of the extensions that are stood in for.
    """
    if not any(isinstance(finder, StandInFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, StandInFinder())
    tops = [name for name in EXTENSIONS if "." not in name]
    return tuple(name for name in tops if _is_stood_in_for(name))


def _is_stood_in_for(name: str) -> bool:
    if name in sys.modules:
        return is_stand_in(sys.modules[name])
    spec = importlib.util.find_spec(name)
    return spec is not None and isinstance(spec.loader, _StandInLoader)
