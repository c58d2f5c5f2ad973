"""Artefacts: one `.pt2` with `ouro.json` inside (docs/artifact_format.md). Data, never code."""

from __future__ import annotations

import hashlib
import json
import warnings
import zipfile
from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from ouro_compiler.errors import ModelError
from ouro_compiler.runtime.compiled_model import CompiledModel, resolve_device

FORMAT_VERSION = 1
_CHECK_TOLERANCE = 1e-3


def constants_digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes of tensors, in name order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_input(shape: list[int]) -> Tensor:
    """The one image that a manifest's checksum was made with."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn([1, *shape[1:]], generator=generator)


def checksum(model: CompiledModel) -> list[float]:
    """The first outputs for `check_input`, for comparison by tolerance on another torch."""
    output = model(check_input(model.manifest["input"]["shape"]))
    return [round(float(value), 6) for value in output.flatten()[:16]]


def save(model: CompiledModel, path: str | PathLike[str]) -> None:
    """Write a model to `path`, through a temporary name."""
    from ouro_compiler.archive import write_archive

    write_archive(model.program, path, model.manifest)


def is_artifact(path: str | PathLike[str]) -> bool:
    """Does this file say that it is an ouro artefact? Nothing in it is trusted or loaded."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/extra/ouro.json") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def load(path: str | PathLike[str], *, device: str | torch.device | None = None) -> CompiledModel:
    """Load an artefact and put it on a device (cpu).

    Raises ModelError if the file is missing, damaged, unsafe to open or no artefact of ours, and
    DeviceError if the device is not there. Warns if another torch version wrote it, and then
    compares its outputs with the stored ones.
    """
    from ouro_compiler.archive import read_archive

    where = resolve_device(device)
    program, manifest = read_archive(path)
    if manifest is None:
        raise ModelError(f"{path} is no ouro artefact: compile it first with ouro-compile")
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise ModelError(
            f"{path} has artefact format {version}, this version reads {FORMAT_VERSION}: "
            "compile the model again"
        )
    if constants_digest(program.state_dict) != manifest.get("constants_sha256"):
        raise ModelError(f"{path} is damaged: its weights do not match their digest")
    model = CompiledModel(program, manifest)
    if manifest["torch_version"] != torch.__version__:
        _compare_with_writer(model, str(path))
    return model.to(where)


def _compare_with_writer(model: CompiledModel, path: str) -> None:
    stored = torch.tensor(model.manifest["checksum"])
    here = torch.tensor(checksum(model))
    limit = _CHECK_TOLERANCE * float(stored.abs().max().clamp(min=1e-6))
    verdict = (
        "gives the stored outputs"
        if bool(((here - stored).abs() <= limit).all())
        else ("DOES NOT give the stored outputs: compile the model again")
    )
    warnings.warn(
        f"{path} was written with torch {model.manifest['torch_version']}, this is "
        f"{torch.__version__}: it {verdict}",
        stacklevel=3,
    )


def build_manifest(
    program: torch.export.ExportedProgram,
    *,
    config: dict[str, Any],
    target: str,
    shape: list[int],
    preprocessing: dict[str, Any] | None,
    report: dict[str, Any],
) -> dict[str, Any]:
    """The content of `ouro.json`, all but the checksum; no times and no paths."""
    from ouro_compiler import __version__

    manifest = {
        "format_version": FORMAT_VERSION,
        "ouro_version": __version__,
        "torch_version": torch.__version__,
        "config": config,
        "target": target,
        "input": {"shape": [1, *shape[1:]], "dtype": "float32"},
        "preprocessing": preprocessing,
        "constants_sha256": constants_digest(program.state_dict),
        "report": report,
    }
    return json.loads(json.dumps(manifest))  # plain JSON data, as a loaded one is
