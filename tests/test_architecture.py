"""Imports point one way, and importing the package stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import ouro_compiler

ROOT = Path(ouro_compiler.__file__).parent

LEAVES = {"errors", "config", "report"}  # and the specs, which only config reads
SHARED = LEAVES | {"ops", "graph"}
# docs/architecture.md has the same table, with reasons.
ALLOWED = {
    "errors": set(),
    "recipe_specs": {"errors"},
    "precision_specs": {"errors"},
    "config": {"errors", "precision_specs", "recipe_specs"},
    "report": set(),
    "report_view": set(),
    "archive_rules": {"errors", "ops"},
    "archive_gate": {"archive_rules"},
    "archive": {"errors", "archive_gate", "archive_rules"},
    "ops": {"config"},
    "graph": {"config"},
    "data": {"config", "errors"},
    "models": {"ops"},
    "kernels": {"errors", "config", "ops"},
    "calibration": SHARED,
    "passes": SHARED | {"calibration"},
    "recipes": SHARED | {"calibration"},
    "sizes": {"graph", "ops"},
    "runtime": LEAVES | {"report_view", "ops", "archive", "kernels"},
    "lowering": SHARED | {"runtime", "kernels"},
    "frontend": LEAVES | {"ops", "graph", "models", "archive"},
    "evaluation": SHARED | {"data"},
    "scoring": {"errors", "data", "evaluation"},
    "inspection": SHARED | {"data", "evaluation"},
    "compiler": SHARED
    | {"data", "models", "calibration", "passes", "recipes", "sizes", "runtime", "lowering"}
    | {"frontend", "evaluation", "inspection", "kernels"},
}
ALLOWED["export"] = SHARED | {"data", "evaluation"}
ALLOWED["measurement"] = SHARED | {"calibration", "evaluation"}
ALLOWED["compiler"] |= {"measurement"}
ALLOWED["synthetic"] = SHARED | {"calibration", "frontend", "kernels"}
ALLOWED["refinement"] = SHARED | {"calibration", "kernels", "passes", "recipes", "synthetic"}
ALLOWED["mixed_precision"] = (
    SHARED
    | {"precision_specs", "calibration", "evaluation", "lowering", "passes", "recipes", "sizes"}
    | {"refinement", "synthetic"}
)
ALLOWED["compiler"] |= {"mixed_precision", "refinement", "synthetic"}
ALLOWED["backend_options"] = LEAVES | {"compiler", "data", "frontend"}
ALLOWED["backend"] = LEAVES | {"backend_options", "compiler", "frontend", "synthetic"}
ALLOWED["comparison"] = LEAVES | {"calibration", "compiler", "data", "runtime", "scoring"}
EVERYTHING = set(ALLOWED)
ALLOWED["cli"] = EVERYTHING
# Written as ouro_compiler.__version__ in the manifest; the public names of __init__ load lazily.
ROOT_NAMES = {"__version__"}


def imports_of(path: Path) -> set[str]:
    """First parts below ouro_compiler of everything a file imports, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            parts = node.module.split(".")
            if parts[0] != "ouro_compiler":
                continue
            if len(parts) > 1:
                found.add(parts[1])
            else:
                found.update(alias.name for alias in node.names if alias.name not in ROOT_NAMES)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                if parts[0] == "ouro_compiler" and len(parts) > 1:
                    found.add(parts[1])
    return found


def test_imports_point_one_way() -> None:
    wrong = []
    for path in sorted(ROOT.rglob("*.py")):
        package = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if package in ("__init__", "__main__"):
            continue
        assert package in ALLOWED, f"{package} has no row in the table"
        bad = imports_of(path) - ALLOWED[package] - {package}
        wrong += [f"{path.relative_to(ROOT)} imports {name}" for name in sorted(bad)]
    assert not wrong, "\n".join(wrong)


def test_imports_inside_functions_are_seen(tmp_path: Path) -> None:
    file = tmp_path / "f.py"
    file.write_text(
        "def f():\n    from ouro_compiler.passes import base\n    import ouro_compiler.cli.app\n"
    )
    assert imports_of(file) == {"passes", "cli"}


def test_importing_the_package_is_light() -> None:
    code = (
        "import sys, ouro_compiler\n"
        "heavy = {'torch', 'triton', 'onnx', 'typer', 'rich', 'PIL', 'safetensors', 'networkx'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
        "ouro_compiler.compile, ouro_compiler.load, ouro_compiler.W4A4\n"
        "import torch\n"
        "print(sorted({'onnx', 'typer', 'rich', 'PIL', 'safetensors'} & set(sys.modules)))\n"
        "print(torch.cuda.is_initialized())\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines() == ["[]", "[]", "False"]


def test_files_are_short() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for path in ROOT.rglob("*.py")
        if (lines := len(path.read_text().splitlines())) > 350
    }
    assert not long
