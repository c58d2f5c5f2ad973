"""Every kernel case in Triton's interpreter, in a process of its own.

The interpreter is chosen when triton is imported. `pytest tests/kernels/cases_scan.py` with
TRITON_INTERPRET=1 runs one file by hand.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = sorted(path.name for path in HERE.glob("cases_*.py"))


def test_names_differ_between_files() -> None:
    """test_gpu.py imports all of them into one module."""
    texts = [(HERE / file).read_text() for file in FILES]
    names = [name for text in texts for name in re.findall(r"^def (test_\w+)", text, re.MULTILINE)]
    assert len(FILES) >= 4
    assert len(names) == len(set(names)) > 20


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Run]]]:
    """All files, as many at a time as there are processors."""
    folder = tmp_path_factory.mktemp("interpreted")
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        yield {file: pool.submit(interpret, file, folder) for file in FILES}


Run = tuple["subprocess.CompletedProcess[str]", Path]


def interpret(file: str, folder: Path) -> Run:
    report = folder / f"{file}.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [*command, f"--junitxml={report}", str(HERE / file)],
        cwd=HERE.parents[1],
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "OURO_CACHE_DIR": str(folder / "cache"),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
    )
    return result, report


@pytest.mark.parametrize("file", FILES)
def test_interpreted(file: str, runs: dict[str, Future[Run]]) -> None:
    result, report = runs[file].result()
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    counts = ET.parse(report).getroot().find("testsuite")
    assert counts is not None
    print(f"{file}: {counts.get('tests')} cases interpreted in {counts.get('time')} s")
    assert int(counts.get("tests", 0)) > 0
    assert {counts.get(key) for key in ("failures", "errors", "skipped")} == {"0"}
