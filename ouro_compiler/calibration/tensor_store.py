"""Tensors on disk for a run that was interrupted: a folder a key, a safetensors file a name.

The key is a digest of all that the tensors depend on. Files carry a digest of their content:
nothing is unpickled, and what is damaged, or was written for something else, is not found.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, fx

from ouro_compiler.graph import constant_names, get_constant

logger = logging.getLogger(__name__)


class TensorStore:
    """Named sets of tensors below `folder`. Where the disk fails, nothing is kept.

    what: what they are, for the log.
    """

    def __init__(self, folder: Path, key: str, what: str) -> None:
        self.folder, self.key, self.what = folder / key, key, what

    def load(self, name: str) -> dict[str, Tensor] | None:
        """Tensors as they were kept, on the CPU; None unless they are there and whole."""
        from safetensors import SafetensorError, safe_open

        path = self._path(name)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            logger.warning("%s cannot be read and is made again: %s", path, error)
            return None
        if metadata.get("key") != self.key or metadata.get("digest") != tensors_digest(tensors):
            logger.warning("%s does not hold what it says and is made again", path)
            return None
        return tensors

    def refuse(self, name: str, why: str) -> None:
        """Log that a file which is whole is of no use."""
        logger.warning("%s holds %s and is made again", self._path(name), why)

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors under a name, atomically."""
        from safetensors.torch import save

        held = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        content = save(held, {"key": self.key, "digest": tensors_digest(held)})
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _replace(self._path(name), content)
        except OSError as error:
            logger.warning("%s are not kept in %s: %s", self.what, self.folder, error)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def _replace(path: Path, content: bytes) -> None:
    descriptor, partial = tempfile.mkstemp(dir=path.parent, suffix=".partial")  # mode 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def constants_of(gm: fx.GraphModule) -> dict[str, Tensor]:
    """The constants that a graph reads, by name."""
    nodes = {str(node.target): node for node in gm.graph.nodes if node.op == "get_attr"}
    found = {name: get_constant(gm, nodes[name]) for name in constant_names(gm)}
    return {name: value for name, value in found.items() if value is not None}


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes of tensors, in name order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
