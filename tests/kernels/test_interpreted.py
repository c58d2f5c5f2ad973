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


@pytest.mark.parametrize("file", FILES)
def test_interpreted(file: str, tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [*command, f"--junitxml={report}", str(HERE / file)],
        cwd=HERE.parents[1],
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "OURO_CACHE_DIR": str(tmp_path / "cache"),
            "OMP_WAIT_POLICY": "PASSIVE",
        },
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    counts = ET.parse(report).getroot().find("testsuite")
    assert counts is not None
    print(f"{file}: {counts.get('tests')} cases interpreted in {counts.get('time')} s")
    assert int(counts.get("tests", 0)) > 0
    assert {counts.get(key) for key in ("failures", "errors", "skipped")} == {"0"}
