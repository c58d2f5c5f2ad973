"""Compare this project's models with public code run as it is: keys, shapes, logits.

    python scripts/compare_models.py --vmamba CHECKOUT --mambavision --timm

--vmamba takes a checkout of github.com/MzeroMiko/VMamba; --mambavision and --timm need the PyPI
packages `mambavision` and `timm` (installed with --no-deps). CUDA is not needed: what public code
imports for it is replaced by stand-ins that call this project's ops. Prints a line for each size
and exits with 1 where keys differ or logits differ by more than 1e-4 of the largest.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.machinery
import importlib.util
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ouro_compiler.models import mambavision, vit, vmamba

TOLERANCE = 1e-4
VMAMBA = {
    "vmamba_tiny_s1l8": "vmamba_tiny_s1l8",
    "vmamba_small_s1l20": "vmamba_small_s1l20",
    "vmamba_base_s1l20": "vmamba_base_s1l20",
    "vmamba_tiny_s2l5": "vmamba_tiny_s2l5",
    "vmamba_small_s2l15": "vmamba_small_s2l15",
    "vmamba_base_s2l15": "vmamba_base_s2l15",
    "vmamba_tiny_v0": "vanilla_vmamba_tiny",
    "vmamba_small_v0": "vanilla_vmamba_small",
    "vmamba_base_v0": "vanilla_vmamba_base",
}
MAMBAVISION = {
    "mambavision_tiny": "mamba_vision_T",
    "mambavision_tiny2": "mamba_vision_T2",
    "mambavision_small": "mamba_vision_S",
    "mambavision_base": "mamba_vision_B",
    "mambavision_large": "mamba_vision_L",
    "mambavision_large2": "mamba_vision_L2",
    "mambavision_large2_512": "mamba_vision_L2_512_21k",
    "mambavision_large3_256": "mamba_vision_L3_256_21k",
    "mambavision_large3_512": "mamba_vision_L3_512_21k",
}
TIMM = {
    f"{family}_{size}": f"{family}_{size}_patch16_224"
    for family in ("vit", "deit")
    for size in ("tiny", "small", "base")
}
# Sizes whose logits are compared too; of the others only keys and shapes, which need no memory.
FORWARD = {"vmamba_tiny_s1l8": (224, 88), "vmamba_tiny_s2l5": (64,), "vmamba_tiny_v0": (88,)}
FORWARD |= {"mambavision_tiny": (224, 96), "mambavision_small": (224,), "mambavision_base": (224,)}
FORWARD |= dict.fromkeys(TIMM, (224,))
TORCHVISION = ("ops", "ops.misc", "transforms", "transforms.functional", "datasets", "models")
TORCHVISION += ("models.feature_extraction", "utils")


class _Anything(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls


class _Missing(metaclass=_Anything):
    """Stands for names of torchvision that nothing here calls."""


class _Module(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Missing


def _stand_in(name: str, **members: Any) -> None:
    """Put a module in the place of one that cannot be imported."""
    module = _Module(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    module.__path__ = []
    module.__dict__.update(members)
    sys.modules[name] = module


def _without_torchvision() -> None:
    if importlib.util.find_spec("torchvision"):
        return
    modes = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
    mode = type("InterpolationMode", (), {one.upper(): one for one in modes})
    mode.NEAREST_EXACT = "nearest-exact"
    frozen = type("FrozenBatchNorm2d", (nn.Module,), {})
    for part in TORCHVISION:
        _stand_in(f"torchvision.{part}", InterpolationMode=mode, FrozenBatchNorm2d=frozen)
    _stand_in("torchvision", __version__="0.0")


def _public_vmamba(checkout: Path) -> types.ModuleType:
    _without_torchvision()
    folder = checkout / "classification" / "models"
    _stand_in("fvcore")
    _stand_in("fvcore.nn")
    sys.path.insert(0, str(folder))

    def no_cuda_scan(
        *operands: Tensor, oflex: bool = True, backend: Any = None, **named: Any
    ) -> Any:
        u, delta, A, B, C, *rest = operands
        names = ("D", "delta_bias", "delta_softplus")
        named = {**dict(zip(names, rest, strict=False)), **named}
        return torch.ops.ouro.selective_scan(u, delta, A, B, C, **named)

    module = importlib.import_module("vmamba")
    module.selective_scan_fn = no_cuda_scan
    module.cross_scan_fn = lambda x, **_: torch.ops.ouro.cross_scan(x)
    module.cross_merge_fn = lambda y, **_: torch.ops.ouro.cross_merge(
        y.flatten(3), y.shape[3], y.shape[4]
    )
    return module


def _public_mambavision() -> types.ModuleType:
    _without_torchvision()
    _stand_in("mamba_ssm")
    _stand_in("mamba_ssm.ops")

    def selective_scan_fn(*args: Any, return_last_state: Any = None, **named: Any) -> Any:
        return torch.ops.ouro.selective_scan(*args, **named)

    _stand_in("mamba_ssm.ops.selective_scan_interface", selective_scan_fn=selective_scan_fn)
    return importlib.import_module("mambavision.models.mamba_vision")


def _randomise(model: nn.Module) -> nn.Module:
    """Weights at which every part of the model shows in the logits."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if "running_var" in name:
                value.uniform_(0.5, 1.5)
            elif value.is_floating_point() and value.dim() < 2:
                value.add_(torch.randn_like(value) * 0.2)
            elif value.is_floating_point():
                value.add_(torch.randn_like(value) * 0.02)
    return model.eval()


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def compare(name: str, config: Any, build: Callable[[], nn.Module]) -> bool:
    """Print one line about a size; False where something differs."""
    with torch.device("meta"):
        ours = config.build()
    linspace = torch.linspace  # public code reads its values while it is being built
    torch.linspace = lambda *args, **named: linspace(*args, **{**named, "device": "cpu"})
    try:
        with torch.device("cpu" if name in FORWARD else "meta"):
            theirs = build()
    finally:
        torch.linspace = linspace
    same = _shapes(ours) == _shapes(theirs)
    size = sum(parameter.numel() for parameter in ours.parameters()) / 1e6
    line = f"{name:24} {size:7.2f} M  keys and shapes {'equal' if same else 'DIFFER'}"
    for side in FORWARD.get(name, ()) if same else ():
        state = {k: v.clone() for k, v in _randomise(theirs).state_dict().items()}
        ours.load_state_dict(state, strict=True, assign=True)
        images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            expected, found = theirs(images), ours.eval()(images)
        error = (expected - found).abs().max().item()
        same = same and error <= TOLERANCE * expected.abs().max().item()
        line += f"  {side} px: max difference {error:.2g} of {expected.abs().max().item():.2g}"
    print(line, flush=True)
    return same


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vmamba", type=Path, metavar="CHECKOUT")
    parser.add_argument("--mambavision", action="store_true")
    parser.add_argument("--timm", action="store_true")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    results: list[bool] = []
    if options.vmamba:
        public = _public_vmamba(options.vmamba)
        for name, theirs in VMAMBA.items():
            results.append(compare(name, vmamba.ARCHITECTURES[name], getattr(public, theirs)))
    if options.mambavision:
        public = _public_mambavision()
        for name, theirs in MAMBAVISION.items():
            results.append(compare(name, mambavision.ARCHITECTURES[name], getattr(public, theirs)))
    if options.timm:
        _without_torchvision()
        create = importlib.import_module("timm").create_model
        for name, theirs in TIMM.items():
            build = lambda theirs=theirs: create(theirs, pretrained=False)  # noqa: E731
            results.append(compare(name, vit.ARCHITECTURES[name], build))
    return 0 if results and all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
