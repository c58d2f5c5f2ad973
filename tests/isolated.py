"""Functions run in a process of their own: what they import or replace stays there."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def run_isolated(function: Callable[[], Any]) -> Any:
    """What a module-level function returns, as JSON carries it. Fails with the child's errors."""
    module, name = function.__module__, function.__name__
    code = f"import json; from {module} import {name}; print('\\n' + json.dumps({name}()))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, f"{module}.{name} failed:\n{result.stderr[-4000:]}"
    return json.loads(result.stdout.splitlines()[-1])
