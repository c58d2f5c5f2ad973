"""One `.pt2` file: written the same byte for byte each time, read without running what it holds.

`torch.export.load` can be made to unpickle, eval, exec, import and open files by the archive it is
given (`archive_gate` says how). So an archive is never handed to it as it came: its bytes are read
once and checked here, and torch gets a new archive, rebuilt from the checked parts alone. Two zip
readers that disagree about one file therefore cannot be played against each other. Dropped on the
way are example inputs (a pickle), guards, descriptions of where ops came from, and extra files.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import sys
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.pt2_archive import PT2ArchiveWriter

from ouro_compiler.archive_gate import clean_model, clean_payloads
from ouro_compiler.archive_rules import ITEM_SIZES, load_json, refuse
from ouro_compiler.errors import ModelError

_MANIFEST = "extra/ouro.json"
_MODEL = "models/model.json"
_SAMPLES = "data/sample_inputs/model.pt"
_WEIGHTS = "data/weights/"
_CONSTANTS = "data/constants/"
_TABLES = {  # folder -> (its table, how its entries of raw tensor data start)
    _WEIGHTS: (f"{_WEIGHTS}model_weights_config.json", "weight_"),
    _CONSTANTS: (f"{_CONSTANTS}model_constants_config.json", "tensor_"),
}
_NEEDED = ("archive_format", "archive_version", _MODEL, *(table for table, _ in _TABLES.values()))
_KNOWN = re.compile(
    r"archive_format|archive_version|byteorder|version|\.(data/)?[a-z_]+"
    r"|models/model\.json|data/sample_inputs/model\.pt|extra/[^/]+"
    r"|data/weights/(model_weights_config\.json|weight_[0-9]+)"
    r"|data/constants/(model_constants_config\.json|tensor_[0-9]+)"
)
_FOREIGN = {  # how an entry starts -> why it is refused
    "data/aotinductor/": "is compiled machine code",
    f"{_CONSTANTS}custom_obj_": "is an object that would be unpickled, which can run code",
    f"{_CONSTANTS}opaque_obj_": "is an object that would be unpickled, which can run code",
    f"{_CONSTANTS}model.pt": "is a pickle in an old format, which can run code",
    f"{_WEIGHTS}model.pt": "is a pickle in an old format, which can run code",
    "models/": "is a second model: save one program a file",
    "data.pkl": "is a pickle: this is a file of torch.save or torch.jit, not of torch.export.save",
}


def write_archive(
    program: ExportedProgram, path: str | os.PathLike[str], manifest: Mapping[str, Any]
) -> None:
    """Write a program and its manifest (`ouro.json`, strict JSON) as one `.pt2`.

    The bytes depend on the program's graph, weights and manifest alone: not on the file's name, the
    process, example inputs, guards or stack traces, which are left out. The program itself is not
    changed. The file appears complete or not at all, and an existing one stays as it was on
    failure. Memory for some three copies of the weights is used, as for reading.

    Raises ModelError where the file cannot be written, or the program holds what `read_archive`
    would refuse; TypeError or ValueError where the manifest is not JSON.
    """
    text = json.dumps(dict(manifest), sort_keys=True, allow_nan=False)
    buffer = io.BytesIO()
    try:
        torch.export.save(program, buffer, extra_files={"ouro.json": text})
        archive = _pack(_checked_records(buffer.getvalue()))
    except ModelError as error:
        raise ModelError(f"cannot save this program: {error}") from None
    except Exception as error:
        raise ModelError(f"cannot save this program: {_sentence(error)}") from error
    _replace(Path(path), archive)


def read_archive(path: str | os.PathLike[str]) -> tuple[ExportedProgram, dict[str, Any] | None]:
    """The program of a `.pt2` and its manifest, None where torch.export.save wrote the file alone.

    Nothing in the file is run: see `check_archive`. The program has no example inputs and no
    guards, whatever the file had. Raises ModelError, one sentence, for a file that is missing,
    damaged, refused, or that this version of torch cannot load.
    """
    data = _read(Path(path))
    try:
        records = _checked_records(data)
        manifest = load_json(records[_MANIFEST], _MANIFEST) if _MANIFEST in records else None
        if manifest is not None and not isinstance(manifest, dict):
            refuse(_MANIFEST, "is no JSON object")
    except ModelError as error:
        advice = "use a file that torch.export.save or ouro_compiler wrote"
        raise ModelError(f"cannot open {os.fspath(path)}: {error}; {advice}") from None
    return _load(records, os.fspath(path)), manifest


def check_archive(data: bytes) -> None:
    """Raise ModelError unless loading this `.pt2` can neither run foreign code nor touch files.

    Refused are: a damaged zip file, compressed, repeated or unknown entries, compiled code, the
    formats of older versions, which pickle; every entry that would be unpickled; weights that reach
    beyond their data; and whatever `archive_gate` does not know. Example inputs and guards of an
    honest file pass, since `read_archive` drops them: do not hand these bytes to
    `torch.export.load`.
    """
    _checked_records(data)


def _checked_records(data: bytes) -> dict[str, bytes]:
    """What of an archive torch may see: {entry: content} without the root folder."""
    try:
        entries = _entries(data)
        model = clean_model(entries[_MODEL], _MODEL)
        records: dict[str, bytes] = {}
        tensors: dict[str, Any] = {}
        for folder, (table, prefix) in _TABLES.items():
            config = clean_payloads(entries[table], table, prefix)
            records |= _cut_payloads(config["config"], entries, folder)
            records[table] = json.dumps(config).encode()
            tensors |= config["config"]
        _check_agreement(model["graph_module"], tensors)
    except RecursionError:
        raise ModelError(f"{_MODEL} is nested too deeply") from None
    records[_MODEL] = json.dumps(model).encode()
    records[_SAMPLES] = b""  # torch reads an empty entry as "no example inputs"
    if _MANIFEST in entries:
        records[_MANIFEST] = entries[_MANIFEST]
    for name in ("archive_format", "archive_version"):
        records[name] = entries[name]
    return records


# The zip file.


def _entries(data: bytes) -> dict[str, bytes]:
    """Every entry of the zip file by its name below the root folder."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            names = _entry_names(file.infolist(), len(data))
            entries = {name: file.read(info) for name, info in names.items()}
    except ModelError:
        raise
    except Exception:  # a damaged file makes zipfile raise errors of many kinds
        refuse("the file", "is damaged, cut short or no .pt2 archive")
    for name in _NEEDED:
        if name not in entries:
            refuse("the archive", f"lacks {name}: save the program with torch.export.save")
    for name, content in {"archive_format": b"pt2", "byteorder": sys.byteorder.encode()}.items():
        if entries.get(name, content) != content:
            refuse(name, f"is {entries[name][:20]!r} instead of {content!r}")
    if not re.fullmatch(rb"[0-9]{1,4}", entries["archive_version"]):
        refuse("archive_version", "is no number")
    return entries


def _entry_names(infos: list[zipfile.ZipInfo], size: int) -> dict[str, zipfile.ZipInfo]:
    if any(info.filename.startswith("serialized_") for info in infos):
        refuse(
            "the archive",
            "has the format of torch 2.7, which is a pickle: load it with torch.export.load if you "
            "trust it, and save it again",
        )
    if infos and min(info.header_offset for info in infos) > 0:
        # a zip file inside a cut one: that of the example inputs
        refuse("the file", "is damaged, cut short or no .pt2 archive")
    names: dict[str, zipfile.ZipInfo] = {}
    root = infos[0].filename.partition("/")[0] if infos else ""
    for info in infos:
        folder, _, name = info.filename.partition("/")
        if folder != root:
            refuse(repr(info.filename), f"lies outside the root folder {root!r}")
        if name in names:
            refuse(repr(name), "is in the archive twice")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            refuse(repr(name), "is compressed or encrypted, which torch.export.save never does")
        if not _KNOWN.fullmatch(name):
            reasons = (why for start, why in _FOREIGN.items() if name.startswith(start))
            refuse(repr(name), next(reasons, "is not part of a program of torch.export.save"))
        names[name] = info
    if sum(info.file_size for info in infos) > size:
        refuse("the archive", f"claims more data than the {size} bytes of the file")
    return names


def _pack(records: Mapping[str, bytes]) -> bytes:
    # From a buffer torch always names the root folder "archive", and it writes no times.
    buffer = io.BytesIO()
    with PT2ArchiveWriter(buffer) as writer:
        for name, content in records.items():
            writer.write_bytes(name, content)
    return buffer.getvalue()


# Tensor data.


def _cut_payloads(
    config: dict[str, Any], entries: Mapping[str, bytes], folder: str
) -> dict[str, bytes]:
    """The tensors' data, cut to what they use; moves their offsets in `config` along.

    torch saves the whole storage behind a weight: cutting makes the file independent of what else
    the storage held, and keeps that out of it.
    """
    shared: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for name, payload in config.items():
        shared.setdefault(payload["path_name"], []).append((name, payload["tensor_meta"]))
    records = {}
    for entry, tensors in shared.items():
        data = entries.get(folder + entry)
        if data is None:
            refuse(folder + entry, f"is missing, and {tensors[0][0]} needs it")
        item = ITEM_SIZES[tensors[0][1]["dtype"]]
        used = [_extent(meta, name, len(data) // item) for name, meta in tensors]
        if len(data) % item or len({meta["dtype"] for _, meta in tensors}) > 1:
            refuse(folder + entry, f"does not fit the data type of {tensors[0][0]}")
        first = min((start for start, stop in used if stop > start), default=0)
        last = max(stop for _, stop in used)
        for _, meta in tensors:
            meta["storage_offset"] = {"as_int": max(meta["storage_offset"]["as_int"] - first, 0)}
        records[folder + entry] = data[first * item : last * item]
    return records


def _extent(meta: dict[str, Any], name: str, available: int) -> tuple[int, int]:
    """First and past-the-last element that a tensor uses of an entry with `available` ones."""
    sizes, strides = _ints(meta["sizes"]), _ints(meta["strides"])
    if len(sizes) != len(strides):
        refuse(f"the weight {name}", f"has {len(sizes)} sizes and {len(strides)} strides")
    count = 1
    for size in sizes:
        count *= size
    if count == 0:
        meta["storage_offset"] = {"as_int": 0}
        return 0, 0
    start: int = meta["storage_offset"]["as_int"]
    stop = start + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True)) + 1
    if count > available or stop > available:
        refuse(f"the weight {name}", f"needs more than the {available} elements of its entry")
    return start, stop


def _ints(values: list[dict[str, int]]) -> list[int]:
    return [value["as_int"] for value in values]


def _check_agreement(graph_module: dict[str, Any], tensors: Mapping[str, Any]) -> None:
    """The graph was traced for the shapes and data types of the weights that the file holds."""
    values = graph_module["graph"]["tensor_values"]
    for spec in graph_module["signature"]["input_specs"]:
        [(kind, held)] = spec.items()
        if kind not in ("parameter", "buffer", "tensor_constant"):
            continue
        name = held[f"{kind}_name"]
        traced = values.get(held["arg"]["name"], {})
        stored = tensors.get(name, {}).get("tensor_meta", {})
        if not stored or any(traced.get(key) != stored[key] for key in ("dtype", "sizes")):
            refuse(
                f"the {kind} {name}", "is missing or differs from what the graph was traced with"
            )


# Files and torch.


def _read(path: Path) -> bytes:
    try:
        if path.is_file():  # a pipe or device would never end
            return path.read_bytes()
        reason = "it is no regular file" if path.exists() else "there is no such file"
    except OSError as error:
        reason = str(error.strerror or error)
    raise ModelError(f"cannot open {path}: {reason}; give the path of a .pt2 file")


def _replace(path: Path, data: bytes) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    except OSError as error:
        raise ModelError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            partial.unlink()


class _Quiet(logging.Filter):
    """Keeps torch's report of a failed load out of the log, and remembers its cause."""

    cause: BaseException | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info:
            self.cause = record.exc_info[1]
        return False


def _load(records: Mapping[str, bytes], path: str) -> ExportedProgram:
    log, quiet = logging.getLogger("torch.export"), _Quiet()
    log.addFilter(quiet)
    try:
        return torch.export.load(io.BytesIO(_pack(records)))
    except Exception as error:
        reason = f"torch {torch.__version__} cannot load it ({_sentence(quiet.cause or error)})"
        raise ModelError(f"cannot open {path}: {reason}; export the model again") from None
    finally:
        log.removeFilter(quiet)


def _sentence(error: BaseException) -> str:
    """The first line of the innermost cause: torch wraps whole tracebacks into its messages."""
    while error.__cause__ is not None:
        error = error.__cause__
    line = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    return line if len(line) <= 200 else f"{line[:197]}..."
