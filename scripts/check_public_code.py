"""Compile unmodified public code from checkouts, and print what came of it.

    git clone https://github.com/hustvl/Vim; git clone https://github.com/MzeroMiko/VMamba
    python -m scripts.check_public_code --vim Vim --vmamba VMamba [--only NAME] [--json]

Each model is small, has random weights and runs in a process of its own: Vim's fork and PyPI's
mamba-ssm share a name. Needs timm and einops; torchvision and fvcore are stubbed where missing.
Eager logits come from the code's own loops over time, not from ouro_compiler. Exits with 1 if a
model fails. VMamba's forward types v2 and xv* are not here, since they do not run in its own code
(an assertion on the scan's backend, a shape); m0 is Mamba-2.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib
import importlib.machinery
import importlib.util
import json
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ouro_compiler as ouro
from tests.public_code import Findings, examine, randomise
from tests.torchvision_stub import install_torchvision_stub

_LIMIT_S = 170


@contextlib.contextmanager
def _bound(namespace: dict[str, Any], **names: Any) -> Iterator[None]:
    """Bind names in a namespace for a while."""
    before = {name: namespace[name] for name in names}
    namespace.update(names)
    try:
        yield
    finally:
        namespace.update(before)


# --- hustvl/Vim


def check_vim(checkout: Path, **options: Any) -> Findings:
    """A VisionMamba of its repository, with its own fork of mamba_ssm."""
    sys.path[:0] = [str(checkout / "mamba-1p1p1"), str(checkout / "vim")]
    install_torchvision_stub()
    ouro.install_standins()
    interface = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
    assert Path(str(interface.__file__)).is_relative_to(checkout), "another mamba_ssm was imported"
    vim = importlib.import_module("models_mamba")
    given: dict[str, Any] = {
        "img_size": 32,
        "patch_size": 8,
        "stride": 8,
        "depth": 2,
        "embed_dim": 32,
        "d_state": 8,
        "num_classes": 10,
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "final_pool_type": "mean",
        "if_abs_pos_embed": True,
        "bimamba_type": "v2",
        "if_cls_token": True,
        "if_divide_out": True,
        "use_middle_cls_token": True,
    }
    torch.manual_seed(0)
    model = randomise(vim.VisionMamba(**{**given, **options}))
    images = torch.randn(4, 3, 32, 32)
    scans, convs = (vars(sys.modules[f"{n}_cuda"]) for n in ("selective_scan", "causal_conv1d"))
    loop = functools.partial(_mamba_extension, interface.selective_scan_ref)
    with _bound(scans, fwd=loop), _bound(convs, causal_conv1d_fwd=_conv_extension):
        eager = _logits(model, images)
    return examine(model, images, eager)


def _mamba_extension(reference: Callable[..., Tensor], *operands: Any) -> list[Tensor]:
    """selective_scan_cuda.fwd by mamba's own loop."""
    y = reference(*operands)
    state = torch.zeros(*y.shape[:2], 1, 2)
    return [y, state, y] if operands[6] is not None else [y, state]


def _conv_extension(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    """causal_conv1d_cuda.causal_conv1d_fwd with SiLU."""
    assert rest[-1] is True
    width = weight.shape[1]
    return F.silu(F.conv1d(F.pad(x, (width - 1, 0)), weight[:, None], bias, groups=x.shape[1]))


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images)


# --- MzeroMiko/VMamba


def check_vmamba(
    checkout: Path, *, forward_type: str, norm: str = "ln2d", file: str = "package", **options: Any
) -> Findings:
    """A VSSM of its repository: of the package in classification/models, or the single file."""
    install_torchvision_stub()
    _stub_fvcore()
    ouro.install_standins()
    vmamba, scans = _load_vmamba(checkout, file)
    torch.manual_seed(0)
    model = vmamba.VSSM(
        depths=[1, 1],
        dims=[32, 64],
        num_classes=10,
        ssm_d_state=options.pop("d_state", 1),
        ssm_ratio=options.pop("ssm_ratio", 1.0),
        ssm_conv_bias=False,
        forward_type=forward_type,
        mlp_ratio=4.0,
        norm_layer=norm,
        downsample_version="v3",
        patchembed_version="v2",
        **options,
    )
    randomise(model)
    images = torch.randn(4, 3, 32, 32)
    loop = functools.partial(_vmamba_loop, vars(scans)["selective_scan_torch"])
    # Its cross scan asks for the tensor's CUDA device even where its PyTorch form runs.
    with (
        _bound(vars(vmamba), selective_scan_fn=loop),
        _bound(vars(torch.cuda), device=contextlib.nullcontext),
    ):
        eager = _logits(model, images)
    return examine(model, images, eager)


def _vmamba_loop(reference: Callable[..., Tensor], *operands: Any, **named: Any) -> Tensor:
    named.pop("backend", None)
    return reference(*operands, **named)


def _load_vmamba(checkout: Path, file: str) -> tuple[types.ModuleType, types.ModuleType]:
    """(the module of VSSM, that of its scans), under names of their own."""
    if file == "single":
        single = _load("public_vmamba_file", checkout / "vmamba.py")
        return single, single
    _load("public_vmamba", checkout / "classification" / "models" / "__init__.py")
    return sys.modules["public_vmamba.vmamba"], sys.modules["public_vmamba.csms6s"]


def _load(name: str, path: Path) -> types.ModuleType:
    folders = [str(path.parent)] if path.name == "__init__.py" else None
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=folders)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _stub_fvcore() -> None:
    """VMamba counts operations with fvcore, and imports it wherever its models are imported."""
    if importlib.util.find_spec("fvcore") is not None:
        return
    for name in ("fvcore", "fvcore.nn"):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        sys.modules[name] = module
    for name in ("FlopCountAnalysis", "flop_count_str", "flop_count", "parameter_count"):
        setattr(sys.modules["fvcore.nn"], name, None)


# --- the table

Check = Callable[..., Findings]
_VMAMBA_TYPES: dict[str, dict[str, Any]] = {
    "v05_noz": {"norm": "ln2d"},
    "v05_noz channels last": {"forward_type": "v05_noz", "norm": "ln"},
    "v05_noz single file": {"forward_type": "v05_noz", "file": "single"},
    "v04": {"norm": "ln", "d_state": 4, "ssm_ratio": 2.0},
    "v03": {"norm": "ln", "d_state": 4},
    "v02": {"norm": "ln", "d_state": 4},
    "v01": {"norm": "ln", "d_state": 4},
    "v3_noz": {"norm": "ln", "d_state": 4},
    "v0": {"norm": "ln", "d_state": 4},
    "v0seq": {"norm": "ln", "d_state": 4},
    "v051d_noz": {},
    "v052d_noz": {},
    "v052dc_noz": {},
}
CHECKS: dict[str, tuple[Check, str, dict[str, Any]]] = {
    "Vim v2": (check_vim, "vim", {}),
    "Vim v2 LayerNorm": (check_vim, "vim", {"rms_norm": False}),
    "Vim v2 unfused": (check_vim, "vim", {"rms_norm": False, "fused_add_norm": False}),
    "Vim v1": (check_vim, "vim", {"if_bimamba": True}),
    "Vim none": (check_vim, "vim", {"bimamba_type": "none"}),
    **{
        f"VMamba {name}": (check_vmamba, "vmamba", {"forward_type": name, **options})
        for name, options in _VMAMBA_TYPES.items()
    },
}


def _run_one(name: str, checkout: Path) -> dict[str, Any]:
    """A check in a process of its own: its findings, or the last line of its error."""
    command = [sys.executable, "-W", "ignore", "-m", "scripts.check_public_code"]
    try:
        result = subprocess.run(
            [*command, "--one", name, "--checkout", str(checkout)],
            capture_output=True,
            text=True,
            timeout=_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"took longer than {_LIMIT_S} s"}
    if result.returncode != 0:
        return {"error": (result.stderr.strip().splitlines() or ["no message"])[-1]}
    return json.loads(result.stdout.splitlines()[-1])


def _row(name: str, found: dict[str, Any]) -> str:
    if "error" in found:
        return f"| {name} | failed: {found['error']} | | | | | | |"
    return (
        f"| {name} | {found['nodes']} | {found['scans']} "
        f"| {found['quantized']} / {found['linears']} | {found['difference']:.1e} "
        f"| {found['snr_db']:.1f} dB | {found['reload_difference']:.1e} "
        f"| {found['compile_seconds']} s |"
    )


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vim", type=Path, help="a checkout of hustvl/Vim")
    parser.add_argument("--vmamba", type=Path, help="a checkout of MzeroMiko/VMamba")
    parser.add_argument("--only", help="only the checks whose name contains this")
    parser.add_argument("--json", action="store_true", help="all findings, one model a line")
    parser.add_argument("--one", choices=CHECKS, help=argparse.SUPPRESS)
    parser.add_argument("--checkout", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        check, _, options = CHECKS[arguments.one]
        print("\n" + json.dumps(dataclasses.asdict(check(arguments.checkout, **options))))
        return 0
    if not arguments.json:
        print("| model | nodes | scans | linears | difference | W4A4 SNR | reloaded | compile |")
        print("|---|---|---|---|---|---|---|---|")
    failures = 0
    for name, (_, repository, _) in CHECKS.items():
        checkout = getattr(arguments, repository)
        if checkout is None or (arguments.only and arguments.only not in name):
            continue
        found = _run_one(name, checkout.resolve())
        failures += "error" in found
        print(json.dumps({"model": name, **found}) if arguments.json else _row(name, found))
        sys.stdout.flush()
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
