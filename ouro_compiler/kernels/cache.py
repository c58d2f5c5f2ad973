"""The private cache of generated code; Triton sources in it are named by the sha256 of their text.

Triton reads a kernel's source back from a file, so it must be on disk; what is executed are the
bytes that were verified, not whatever the file holds a moment later.
"""

from __future__ import annotations

import functools
import hashlib
import linecache
import logging
import os
import stat
import tempfile
import types
from pathlib import Path
from typing import Any

from ouro_compiler.errors import CacheError
from ouro_compiler.kernels.codegen import generate, kernel_name
from ouro_compiler.kernels.int4_matrix import NibbleKernel, multiplies_nibbles
from ouro_compiler.kernels.spec import KernelSpec

logger = logging.getLogger(__name__)


def cache_directory(kind: str) -> Path:
    """A folder of one kind ("triton", "cpp", "synthetic", "tuning") for what is made; private.

    It is in $OURO_CACHE_DIR, else in ouro_compiler in the user's cache.

    Raises CacheError if it cannot be made, belongs to somebody else or others may write to it.
    """
    chosen = os.environ.get("OURO_CACHE_DIR")
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    path = Path(chosen or os.path.join(root, "ouro_compiler")).expanduser() / kind
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise CacheError(
            f"cannot use {path} as a cache ({error.strerror}): "
            "set OURO_CACHE_DIR to a private directory"
        ) from error
    if not stat.S_ISDIR(found.st_mode):
        problem = "is no directory"
    elif found.st_uid != os.getuid():
        problem = "belongs to another user"
    elif found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        problem = "can be written by others"
    else:
        return path
    raise CacheError(
        f"{path} {problem}: what is generated is not kept there; "
        "set OURO_CACHE_DIR to a private directory"
    )


def write_source(text: str) -> Path:
    """Put a source into the cache; returns its path. A file with other content is replaced."""
    content = text.encode()
    digest = hashlib.sha256(content).hexdigest()
    path = cache_directory("triton") / f"{digest}.py"
    if path.exists():
        if hashlib.sha256(path.read_bytes()).hexdigest() == digest:
            return path
        logger.warning("%s does not hold what its name says: it is written again", path)
    descriptor, partial = tempfile.mkstemp(dir=path.parent, suffix=".partial")  # mode 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
    return path


def import_source(path: Path) -> types.ModuleType:
    """Execute a cached source. Raises CacheError if its sha256 is not its name."""
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != path.stem:
        raise CacheError(f"{path} was changed after it was generated: delete it")
    text = content.decode()
    # inspect and Triton read source through linecache: pin it to the verified text.
    linecache.cache[str(path)] = (len(text), None, text.splitlines(keepends=True), str(path))
    module = types.ModuleType(f"ouro_kernel_{path.stem}")
    module.__file__ = str(path)
    exec(compile(text, str(path), "exec"), module.__dict__)
    return module


@functools.cache
def load_kernel(spec: KernelSpec) -> Any:
    """The `triton.jit` function of a spec: generated, cached, verified, imported."""
    kernel = getattr(import_source(write_source(generate(spec))), kernel_name(spec))
    return NibbleKernel(kernel) if multiplies_nibbles(spec) else kernel
