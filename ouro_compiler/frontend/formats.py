"""Model files of every format, told by their content, read into tensors by name.

Nothing in a file is executed unless the caller allows pickle: safetensors are data, and torch.save
files are read with weights_only, with inert objects where they name classes (`pickles`). Every
ModelError here speaks of the file as "it".
"""

from __future__ import annotations

import pickle
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ouro_compiler.errors import ModelError
from ouro_compiler.frontend.pickles import load_inert

FileKind = Literal["safetensors", "torch", "exported"]

_MAX_SAFETENSORS_HEADER = 100_000_000  # the format's own limit, in bytes
_WRAPPERS = ("model", "state_dict")
_AVERAGES = ("model_ema", "state_dict_ema")
_PREFIXES = ("module.", "encoder.", "model.")


def file_kind(path: Path) -> FileKind:
    """What wrote the file, from its first bytes and, for a zip archive, its table of contents.

    Raises ModelError for a file that is missing, unreadable, empty, cut short or of another kind.
    """
    try:
        if not path.is_file():  # a pipe or device would never end
            raise ModelError("it is no regular file" if path.exists() else "it does not exist")
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise ModelError(f"it cannot be read ({error.strerror})") from error
    if not head:
        raise ModelError("it is empty")
    if head[8:] == b"{" and int.from_bytes(head[:8], "little") <= _MAX_SAFETENSORS_HEADER:
        return "safetensors"
    if head.startswith(b"PK\x03\x04"):
        return _zip_kind(path)
    if head.startswith(b"\x80"):  # torch.save before torch 1.6: a sequence of pickles
        return "torch"
    raise ModelError(
        "it is cut short or no model file (expected safetensors, torch.save or torch.export)"
    )


def _zip_kind(path: Path) -> FileKind:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
        raise ModelError("it is damaged or cut short") from error
    # Everything lies in one folder, named after the file when it was saved.
    names = {entry.partition("/")[2] for entry in entries}
    if "models/model.json" in names or any(entry.startswith("serialized_") for entry in entries):
        return "exported"
    if "constants.pkl" in names:
        raise ModelError("it is a TorchScript archive; save the model's state_dict instead")
    if "data.pkl" in names:
        return "torch"
    raise ModelError("it is a zip archive without a model in it")


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors by name on the CPU, metadata). Raises ModelError for a damaged file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return _without_prefix(state), file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ModelError("it is damaged or cut short") from error


def read_torch(path: Path, *, allow_pickle: bool) -> object:
    """What a torch.save file holds, tensors on the CPU; objects of unknown classes are inert.

    Unpickles in full, which runs code that the file brings, only if that is both allowed and
    needed. Raises ModelError where it is needed but not allowed, and for a damaged file.
    """
    try:
        return _torch_load(path, weights_only=True)
    except pickle.UnpicklingError as error:
        content = _read_inert(path)
        if content is not None:
            return content
        if not allow_pickle:
            raise ModelError(
                "it holds pickled Python objects; pass --allow-pickle only if you trust its author"
            ) from error
    except Exception as error:  # damaged bytes surface as nearly any exception
        raise ModelError("it is damaged or cut short") from error
    try:
        return _torch_load(path, weights_only=False)
    except Exception as error:  # the file's own code runs here
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ModelError(f"it cannot be unpickled ({type(error).__name__}: {reason})") from error


def _read_inert(path: Path) -> object | None:
    """A checkpoint's tensors beside objects that do nothing; None if it is no such checkpoint."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = load_inert(path)
    except Exception:  # what it could not read, and damaged bytes
        return None
    return content if isinstance(content, Mapping) else None


def _torch_load(path: Path, *, weights_only: bool) -> object:
    # Given a path, torch.load would go by its suffix. Its warnings ask for reports to PyTorch.
    with path.open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(file, map_location="cpu", weights_only=weights_only)


def unwrap(content: object, *, ema: bool = False) -> dict[str, Tensor]:
    """The state_dict in what torch.save wrote: all of it, or what is under `model`, `state_dict`.

    Averages of weights (`model_ema`, `state_dict_ema`) are read where there is nothing else, as
    public evaluation code does it, or with `ema`. A prefix such as `module.` that every name has is
    taken off. Raises ModelError where there are no tensors by name, or no averages under `ema`.
    """
    keys = _AVERAGES if ema else (*_WRAPPERS, *_AVERAGES)
    if isinstance(content, Mapping):
        held = (content.get(key) for key in keys)
        found = next((value for value in held if isinstance(value, Mapping)), None)
        if ema and found is None:
            raise ModelError(f"it holds no average of weights: nothing under {' or '.join(keys)}")
        content = content if found is None else found
    if not isinstance(content, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    ):
        raise ModelError(
            "it holds no state_dict: expected tensors by name, bare or under "
            f"{' or '.join(_WRAPPERS)}"
        )
    return _without_prefix(content)


def _without_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    state = dict(state)
    while state:
        shared = [prefix for prefix in _PREFIXES if all(key.startswith(prefix) for key in state)]
        if not shared:
            break
        state = {key.removeprefix(shared[0]): tensor for key, tensor in state.items()}
    return state
