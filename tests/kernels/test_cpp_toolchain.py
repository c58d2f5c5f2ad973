"""The compiler and its cache: what is missing, broken, slow, poisoned or shared."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import ouro_compiler.kernels.cpu  # noqa: F401  (registers the kernels)
from ouro_compiler.kernels.cpp import launch as cpp_launch
from ouro_compiler.kernels.cpp import toolchain
from ouro_compiler.kernels.cpp.toolchain import BuildError, build, find_toolchain
from ouro_compiler.kernels.dispatch import ReferenceWarning
from ouro_compiler.ops.selective_scan import selective_scan_implementation

SOURCE = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache, and nothing loaded or refused before."""
    monkeypatch.setenv("OURO_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cpp_launch, "_functions", {})
    monkeypatch.setattr(cpp_launch, "_failures", {})
    find_toolchain.cache_clear()
    yield
    find_toolchain.cache_clear()


def scan_on_reference(match: str) -> None:
    """The op gives the reference's values, and one warning says why."""
    u = torch.randn(1, 3, 4)
    given = (u, u.abs(), -torch.ones(3, 2), torch.randn(1, 2, 4), torch.randn(1, 2, 4))
    with pytest.warns(ReferenceWarning, match=match) as found:
        y = torch.ops.ouro.selective_scan(*given)
    assert len(found) == 1
    assert torch.equal(y, selective_scan_implementation(*given))


def compiler(tmp_path: Path, script: str) -> str:
    path = tmp_path / "cxx"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_builds_once() -> None:
    found = find_toolchain()
    assert found is not None
    path = build(SOURCE, found)
    before = path.stat().st_mtime_ns
    assert build(SOURCE, found) == path
    assert path.stat().st_mtime_ns == before
    assert path.stat().st_mode & 0o077 == 0
    assert [p.name for p in path.parent.iterdir()] == [path.name], "nothing else is left"


def test_flags_and_compiler_are_in_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = find_toolchain()
    monkeypatch.setenv("OURO_CXXFLAGS", "-O1")
    find_toolchain.cache_clear()
    other = find_toolchain()
    assert plain is not None
    assert other is not None
    assert plain.digest(SOURCE) != other.digest(SOURCE)
    assert plain.digest(SOURCE) != plain.digest(SOURCE + " ")


def test_without_a_compiler_the_reference_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    find_toolchain.cache_clear()
    scan_on_reference("no C.. compiler was found: install g.. or clang.., or set CXX")


def test_a_compiler_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    script = f"echo once >> {calls}; echo 'error: out of luck' >&2; exit 1"
    monkeypatch.setenv("CXX", compiler(tmp_path, script))
    find_toolchain.cache_clear()
    for _ in range(3):
        scan_on_reference("failed: error: out of luck")
    assert calls.read_text() == "once\n", "a failure is remembered"


def test_a_compiler_that_hangs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", compiler(tmp_path, "exec sleep 60"))
    monkeypatch.setattr(toolchain, "COMPILE_SECONDS", 0.2)
    find_toolchain.cache_clear()
    start = time.monotonic()
    scan_on_reference("did not finish within 0.2 s")
    assert time.monotonic() - start < 30


def test_a_library_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = 'while [ "$1" != -o ]; do shift; done; echo nonsense > "$2"'
    monkeypatch.setenv("CXX", compiler(tmp_path, script))
    find_toolchain.cache_clear()
    scan_on_reference("the compiled kernel cannot be loaded")


def test_a_poisoned_entry_is_built_again() -> None:
    found = find_toolchain()
    assert found is not None
    path = build(SOURCE, found)
    good = path.read_bytes()
    path.write_bytes(good[:-1] + b"x")
    again = build(SOURCE, found)
    assert again.read_bytes() != good[:-1] + b"x"
    assert toolchain._is_intact(again)


def test_an_entry_of_somebody_else_is_built_again(monkeypatch: pytest.MonkeyPatch) -> None:
    found = find_toolchain()
    assert found is not None
    path = build(SOURCE, found)
    if os.getuid() == 0:
        os.chown(path, 12345, -1)
    else:
        path.unlink()
        path.symlink_to("/dev/null")
    again = build(SOURCE, found)
    assert again.lstat().st_uid == os.getuid()
    assert not again.is_symlink()


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    found = find_toolchain()
    assert found is not None
    with pytest.raises(BuildError, match="failed"):
        build("this is no C++", found)
    assert list((tmp_path / "cache" / "cpp").iterdir()) == []


def test_processes_may_start_together(tmp_path: Path) -> None:
    """First use by several at once: each gets a whole library, and the cache ends up intact."""
    code = (
        "from ouro_compiler.kernels.cpp.toolchain import build, find_toolchain\n"
        "import ctypes\n"
        f"path = build({SOURCE!r}, find_toolchain())\n"
        "print(ctypes.CDLL(str(path)).answer())\n"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert [process.communicate()[0] for process in running] == ["42\n"] * 3
    left = list((tmp_path / "cache" / "cpp").iterdir())
    assert left
    assert all(toolchain._is_intact(path) for path in left)
