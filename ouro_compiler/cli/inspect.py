"""`ouro inspect`: the nodes of an artefact, or of a model after a pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ouro_compiler.cli.console import print_table

if TYPE_CHECKING:
    from torch import fx

_NOISE_IMAGES = 8
_PIPED_WIDTH = 240  # one line a node, for grep


def run(
    path: Path,
    *,
    as_json: bool,
    after: str | None,
    calibration: str,
    arch: str | None,
    allow_pickle: bool,
) -> None:
    """Print the graph. Raises OuroError subclasses."""
    from ouro_compiler.errors import UsageError
    from ouro_compiler.inspection.nodes import NODES_SCHEMA_VERSION, node_rows
    from ouro_compiler.runtime.artifact import is_artifact, load

    header: dict[str, Any]
    if is_artifact(path):
        if after is not None:
            raise UsageError("--after is for models: an artefact has been through every pass")
        compiled = load(path)
        manifest = compiled.manifest
        shares = {row["name"]: row["outlier_share"] for row in manifest["report"]["sites"]}
        rows = node_rows(compiled.graph_module, shares)
        header = {key: value for key, value in manifest.items() if key != "report"}
        header["report"] = manifest["report"]
    else:
        gm, name = _graph_of_model(path, after, calibration, arch, allow_pickle)
        rows = node_rows(gm)
        header = {"after": name}
    if as_json:
        print(json.dumps({"schema_version": NODES_SCHEMA_VERSION, **header, "nodes": rows}))
        return
    _print_nodes(rows)


def _graph_of_model(
    path: Path, after: str | None, calibration: str, arch: str | None, allow_pickle: bool
) -> tuple[fx.GraphModule, str]:
    from ouro_compiler.compiler import graph_after
    from ouro_compiler.data import noise_images, open_images
    from ouro_compiler.frontend.checkpoint import load_model

    loaded = load_model(path, arch=arch, allow_pickle=allow_pickle)
    if calibration == "noise":
        images = noise_images(loaded.preprocessing, _NOISE_IMAGES, 0)
    else:
        images = open_images(calibration, loaded.preprocessing, limit=_NOISE_IMAGES)
    return graph_after(loaded.module, loaded.example, after, calibration=images)


def _print_nodes(rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table("node", "op", "shape", "dtype", "bits", "scale (median)", "outliers", "site")
    for row in rows:
        shape = "x".join(str(size) for size in row["shape"]) if row["shape"] is not None else ""
        bits = str(row["bits"]) if "bits" in row else ""
        if "outlier_bits" in row:
            bits += f"/{row['outlier_bits']}"
        share = row.get("outlier_share")
        table.add_row(
            row["name"],
            row["op"],
            shape,
            row["dtype"] or "",
            bits,
            f"{row['scale']['median']:.4g}" if "scale" in row else "",
            f"{100 * share:.2f} %" if share is not None else "",
            row.get("site", ""),
        )
    print_table(table, piped_width=_PIPED_WIDTH)
