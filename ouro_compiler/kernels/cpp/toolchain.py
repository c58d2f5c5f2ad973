"""The machine's C++ compiler: found, named in cache keys, and run with a time limit."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ouro_compiler.kernels.cache import cache_directory

COMPILE_SECONDS = 120
_SEARCHED = ("g++", "clang++", "c++")
# No -ffast-math, and no contraction: where a multiply-add rounds once, the source says so.
_FLAGS: tuple[str, ...] = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-shared",
)
_FLAGS += ("-fPIC", "-w")


class BuildError(Exception):
    """A kernel could not be compiled or loaded; the message says why in one sentence."""


@dataclass(frozen=True)
class Toolchain:
    """A compiler's command with its flags, and what else its output depends on."""

    command: tuple[str, ...]
    identity: str

    def digest(self, source: str) -> str:
        """sha256 over source, compiler, flags and the processor's features."""
        content = json.dumps([source, self.command, self.identity])
        return hashlib.sha256(content.encode()).hexdigest()


@functools.cache
def find_toolchain() -> Toolchain | None:
    """$CXX if it is set, else the first of g++, clang++ and c++; None if there is none.

    $OURO_CXXFLAGS is added to the flags (for sanitizers, say).
    """
    asked = shlex.split(os.environ.get("CXX", ""))
    for first, *rest in [asked] if asked else [[name] for name in _SEARCHED]:
        path = shutil.which(first)
        if path is None:
            continue
        # One OpenMP runtime in the process: torch's, which is GNU's.
        openmp = "-fopenmp=libgomp" if "clang" in Path(path).name else "-fopenmp"
        extra = shlex.split(os.environ.get("OURO_CXXFLAGS", ""))
        status = os.stat(path)
        identity = json.dumps([os.path.realpath(path), status.st_size, status.st_mtime_ns, *_cpu()])
        return Toolchain((path, *rest, *_FLAGS, openmp, *extra), identity)
    return None


@functools.cache
def cpu_features() -> frozenset[str]:
    """The processor's instruction sets as Linux names them; empty elsewhere."""
    lines = [line for line in _cpu() if line.startswith(("flags", "Features"))]
    return frozenset(word for line in lines for word in line.partition(":")[2].split())


def _cpu() -> list[str]:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return [platform.machine(), platform.processor()]
    wanted = ("flags", "Features", "model name", "vendor_id")
    return [platform.machine(), *sorted({line for line in lines if line.startswith(wanted)})]


def build(source: str, toolchain: Toolchain) -> Path:
    """The shared library of a source, compiled if the cache does not hold it.

    Its name carries the digest of what it was made from and the sha256 of its own bytes. An entry
    that is not what its name says, or belongs to somebody else, is deleted and built again.
    Raises BuildError, and CacheError for a cache directory that cannot be used.
    """
    directory = cache_directory("cpp")
    digest = toolchain.digest(source)
    for path in sorted(directory.glob(f"{digest}-*.so")):
        if _is_intact(path):
            return path
        path.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as work:
        text, library = Path(work, "kernel.cpp"), Path(work, "kernel.so")
        text.write_text(source)
        _run([*toolchain.command, "-o", str(library), str(text)])
        path = directory / f"{digest}-{_sha256(library)}.so"
        library.chmod(0o600)
        os.replace(library, path)
    return path


def _run(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILE_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{command[0]} did not finish within {COMPILE_SECONDS} s") from error
    except subprocess.CalledProcessError as error:
        said = (error.stderr or "").strip().splitlines() or ["it gave no message"]
        first = next((line for line in said if "error" in line), said[0])
        raise BuildError(f"{command[0]} failed: {first}") from error
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run: {error.strerror}") from error


def _is_intact(path: Path) -> bool:
    try:
        owned = path.lstat().st_uid == os.getuid() and not path.is_symlink()
        return owned and _sha256(path) == path.stem.partition("-")[2]
    except OSError:
        return False


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
