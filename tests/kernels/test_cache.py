"""The cache of generated sources is private, verified and never half-written."""

from __future__ import annotations

import hashlib
import logging
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from ouro_compiler.errors import CacheError
from ouro_compiler.kernels import cache
from ouro_compiler.kernels.cache import cache_directory, import_source, write_source

TEXT = '"""A source."""\n\nVALUE = 41 + 1\n'


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OURO_CACHE_DIR", str(tmp_path / "ouro"))
    return tmp_path / "ouro" / "triton"


def test_directory_is_made_private(place: Path) -> None:
    assert cache_directory("triton") == place
    assert stat.S_IMODE(place.stat().st_mode) == 0o700


def test_default_is_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OURO_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory("triton") == tmp_path / "xdg" / "ouro_compiler" / "triton"


def test_files_are_named_by_their_hash_and_private(place: Path) -> None:
    path = write_source(TEXT)
    assert path == place / f"{hashlib.sha256(TEXT.encode()).hexdigest()}.py"
    assert path.read_text() == TEXT
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert import_source(path).VALUE == 42
    assert list(place.iterdir()) == [path], "nothing else is left, no bytecode either"


def test_second_write_leaves_the_file_alone() -> None:
    path = write_source(TEXT)
    before = path.stat().st_mtime_ns, path.stat().st_ino
    assert write_source(TEXT) == path
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == before


def test_changed_file_is_not_imported(tmp_path: Path) -> None:
    path = write_source(TEXT)
    marker = tmp_path / "ran"
    path.write_text(f"open({str(marker)!r}, 'w')\n")
    with pytest.raises(CacheError, match="was changed after it was generated"):
        import_source(path)
    assert not marker.exists()


def test_changed_file_is_written_again(caplog: pytest.LogCaptureFixture) -> None:
    path = write_source(TEXT)
    path.write_text("VALUE = 13\n")
    with caplog.at_level(logging.WARNING):
        assert import_source(write_source(TEXT)).VALUE == 42
    assert "does not hold what its name says" in caplog.text


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_directory_that_others_can_write_is_refused(place: Path, mode: int) -> None:
    cache_directory("triton")
    place.chmod(mode)
    with pytest.raises(CacheError, match=r"can be written by others.*OURO_CACHE_DIR"):
        write_source(TEXT)
    assert list(place.iterdir()) == []


def test_directory_of_another_user_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache_directory("triton")
    monkeypatch.setattr(os, "getuid", lambda: place.stat().st_uid + 1)
    with pytest.raises(CacheError, match="belongs to another user"):
        write_source(TEXT)


def test_link_is_refused(place: Path, tmp_path: Path) -> None:
    place.parent.mkdir(mode=0o700)
    (tmp_path / "elsewhere").mkdir()
    place.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CacheError, match="is no directory"):
        write_source(TEXT)


def test_place_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OURO_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(CacheError, match=r"cannot use .*: set OURO_CACHE_DIR"):
        cache_directory("triton")
    assert CacheError.exit_code == 2


def test_failed_write_leaves_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(cache.os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        write_source(TEXT)
    assert list(place.iterdir()) == []


def test_many_processes_write_one_file(place: Path) -> None:
    code = (
        "from ouro_compiler.kernels.cache import *\n"
        f"print(import_source(write_source({TEXT!r})).VALUE)"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(4)
    ]
    assert [process.communicate()[0] for process in running] == [b"42\n"] * 4
    assert len(list(place.iterdir())) == 1
