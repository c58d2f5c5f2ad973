"""`ouro inspect`: the nodes of an artefact, or of a model after a pass."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ouro_compiler.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table
    from torch import fx

    from ouro_compiler.cli.source import ModelSource
    from ouro_compiler.config import QuantConfig

_NOISE_IMAGES = 8
_PIPED_WIDTH = 240  # one line a node, for grep


@dataclass(frozen=True, kw_only=True)
class _Subject:
    """A graph to show, with what is known beyond it."""

    gm: fx.GraphModule
    header: dict[str, Any]
    shares: dict[str, float | None] = field(default_factory=dict)  # by site
    kernels: dict[str, str] = field(default_factory=dict)  # by layer, or by node


@dataclass(frozen=True, kw_only=True)
class InspectRequest:
    """html, trace: files to write in place of showing the graph in a format.

    preset, recipe, settings: how a model is quantized (w4a4, ouromamba).
    """

    source: ModelSource
    format: str
    after: str | None
    block: str | None
    output: Path | None
    calibration: str
    html: Path | None = None
    trace: Path | None = None
    images: int | None = None
    preset: str | None = None
    recipe: str | None = None
    settings: tuple[str, ...] = ()
    time: bool = False

    @cached_property
    def config(self) -> QuantConfig:
        """The preset with --recipe and --set applied. Raises UsageError for one that is none."""
        from ouro_compiler.config import PRESETS
        from ouro_compiler.recipes import find_recipe

        preset = self.preset or "w4a4"
        if preset not in PRESETS:
            raise UsageError(f"no preset is called {preset}: the presets are {', '.join(PRESETS)}")
        config = PRESETS[preset]
        chosen = () if self.recipe is None else (f"recipe={self.recipe}",)
        for setting in (*chosen, *self.settings):
            config = config.with_setting(setting)
        return find_recipe(config.recipe).configure(config)


def run(request: InspectRequest) -> None:
    """Show the graph in a format, or write a page or a trace. Raises OuroError subclasses."""
    _check(request)
    if request.trace is not None:
        from ouro_compiler.cli.inspect_trace import write

        write(request, request.trace)
    if request.html is not None:
        from ouro_compiler.cli.inspect_page import PageRequest, write_page

        write_page(
            PageRequest(
                source=request.source,
                html=request.html,
                calibration=request.calibration,
                images=request.images or _NOISE_IMAGES,
                config=request.config,
                time=request.time,
            )
        )
    if request.trace is None and request.html is None:
        _show(request)


def _check(request: InspectRequest) -> None:
    """Refuse what cannot be written, and options that would say nothing."""
    from ouro_compiler.runtime.artifact import is_artifact

    how = (request.preset, request.recipe, *request.settings)
    if any(one is not None for one in how) and is_artifact(Path(request.source.name)):
        raise UsageError(
            "--preset, --recipe and --set are for models: an artefact has its configuration"
        )
    for path in (request.output, request.html, request.trace):
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise UsageError(f"{path} is no file in an existing folder")
    shown = (request.format != "text", request.after, request.block, request.output)
    if request.html is None and request.time:
        raise UsageError("--time is for --html")
    if request.html is None and request.trace is None:
        if request.images is not None:
            raise UsageError("--images is for --html and --trace")
    elif any(shown):
        raise UsageError(
            "--html and --trace show the whole: leave out --format, --after, --block and -o"
        )


def _show(request: InspectRequest) -> None:
    from ouro_compiler.cli.console import print_table, table_text, write_text
    from ouro_compiler.runtime.artifact import is_artifact

    source, after, output = request.source, request.after, request.output
    format, block = request.format, request.block
    path = Path(source.name)
    if is_artifact(path):
        if after is not None:
            raise UsageError("--after is for models: an artefact has been through every pass")
        subject = _artefact(path)
    else:
        gm, name = _graph_of_model(source, after, request.calibration, request.config)
        subject = _Subject(gm=gm, header={"after": name})
    if format == "text":
        table = _table(_rows(subject, block))
        if output is None:
            print_table(table, piped_width=_PIPED_WIDTH)
            return
        text = table_text(table, _PIPED_WIDTH)
    elif format == "json":
        text = _json(subject, block)
    else:
        text = _network_text(subject, format, block, source.stem)
    if output is None:
        print(text, end="")
    else:
        write_text(output, text)


def _artefact(path: Path) -> _Subject:
    from ouro_compiler.cli.inspect_page import kernels_of
    from ouro_compiler.runtime.artifact import load

    compiled = load(path)
    manifest = compiled.manifest
    report = manifest["report"]
    header = {key: value for key, value in manifest.items() if key != "report"}
    return _Subject(
        gm=compiled.graph_module,
        header={**header, "report": report},
        shares={row["name"]: row["outlier_share"] for row in report["sites"]},
        kernels=kernels_of(compiled),
    )


def _graph_of_model(
    source: ModelSource, after: str | None, calibration: str, config: QuantConfig
) -> tuple[fx.GraphModule, str]:
    from ouro_compiler.compiler import graph_after
    from ouro_compiler.data import noise_images, open_images

    loaded = source.load()
    if calibration == "noise":
        images = noise_images(loaded.preprocessing, _NOISE_IMAGES, 0)
    else:
        images = open_images(calibration, loaded.preprocessing, limit=_NOISE_IMAGES)
    return graph_after(loaded.module, loaded.example, after, calibration=images, config=config)


def _rows(subject: _Subject, block: str | None) -> list[dict[str, Any]]:
    from ouro_compiler.inspection.network import build_network, restrict_to_block
    from ouro_compiler.inspection.nodes import node_rows

    rows = node_rows(subject.gm, subject.shares, subject.kernels)
    if block is None:
        return rows
    kept = restrict_to_block(build_network(subject.gm), block)
    return [row for row in rows if row["name"] in kept]


def _json(subject: _Subject, block: str | None) -> str:
    from ouro_compiler.inspection.nodes import NODES_SCHEMA_VERSION

    nodes = _rows(subject, block)
    head = {"schema_version": NODES_SCHEMA_VERSION, **subject.header}
    return json.dumps({**head, "nodes": nodes}) + "\n"


def _network_text(subject: _Subject, format: str, block: str | None, label: str) -> str:
    from ouro_compiler.inspection.dot import to_dot
    from ouro_compiler.inspection.model_explorer import to_model_explorer
    from ouro_compiler.inspection.network import (
        build_network,
        fold_network,
        restrict_to_block,
        to_graphml,
    )

    network = build_network(subject.gm, subject.shares, subject.kernels)
    if format == "dot":
        network = fold_network(network)
    if block is not None:
        network = restrict_to_block(network, block)
    if format == "model-explorer":
        return to_model_explorer(network, label)
    return to_dot(network) if format == "dot" else to_graphml(network)


def _table(rows: list[dict[str, Any]]) -> Table:
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
    return table
