"""The tests of the C++ kernels once more, with addresses and undefined behaviour checked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ouro_compiler.kernels.cpp.toolchain import find_toolchain

pytestmark = pytest.mark.slow
FOLDER = Path(__file__).parent
FLAGS = "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined"
CASES = sorted(
    path.name
    for path in FOLDER.glob("test_cpu_*.py")  # what calls generated C++
)


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """A Python process whose kernels are built with sanitizers."""
    found = find_toolchain()
    if found is None or "clang" in found.command[0]:
        pytest.skip("needs g++, whose sanitizers can be preloaded")

    def runtime(name: str) -> str:
        asked = [found.command[0], f"-print-file-name={name}"]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()

    environment = {
        **os.environ,
        "OURO_CXXFLAGS": FLAGS,
        "OURO_CACHE_DIR": str(folder),
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libubsan.so')}",
        "ASAN_OPTIONS": "detect_leaks=0",  # Python itself leaves memory behind
        "OMP_NUM_THREADS": "2",
    }
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=FOLDER.parents[1],
    )


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return p[4];", "AddressSanitizer: heap-buffer-overflow"),
        ("return 1 << p[0];", "runtime error: shift exponent 77"),
    ],
)
def test_a_fault_is_found(tmp_path: Path, body: str, said: str) -> None:
    """What the test below would not see, it would not mean anything."""
    source = f'extern "C" int fault(int* p) {{ {body} }}\n'
    code = (
        "import ctypes, torch\n"
        "from ouro_compiler.kernels.cpp.toolchain import build, find_toolchain\n"
        f"library = ctypes.CDLL(str(build({source!r}, find_toolchain())))\n"
        "tensor = torch.full((4,), 77, dtype=torch.int32)\n"
        "library.fault(ctypes.c_void_p(tensor.data_ptr()))\n"
    )
    result = run(tmp_path, "-c", code)
    assert result.returncode != 0
    assert said in result.stderr


@pytest.mark.parametrize("case", CASES)
def test_kernels_under_sanitizers(case: str, tmp_path: Path) -> None:
    command = ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"tests/kernels/{case}")
    result = run(tmp_path, *command)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
