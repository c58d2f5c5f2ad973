"""One self-contained HTML page about a compiled model: graph, passes, layers, activations, sizes.

The page loads nothing, keeps nothing, and shows names as text whatever they hold. The same content
gives the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from ouro_compiler.inspection.charts import site_charts
from ouro_compiler.inspection.dot import VIEWS
from ouro_compiler.inspection.layout import NODE_HEIGHT, NODE_WIDTH
from ouro_compiler.inspection.packing import pack_stages
from ouro_compiler.inspection.probe import Sample
from ouro_compiler.inspection.stages import Stage

_BAR = 200  # pixels of the largest part's bar


@dataclass(frozen=True, kw_only=True)
class PageContent:
    """What the page shows. stages: the last one is the compiled graph. times: ms by node's name."""

    title: str
    stages: Sequence[Stage]
    stage_note: str
    report: Mapping[str, Any]
    facts: Sequence[str] = ()  # of the whole, for the head of the page
    sample: Sample = field(default_factory=Sample)
    sample_note: str = ""
    times: Mapping[str, float] = field(default_factory=dict)
    png: str | None = None  # the images, base64
    png_note: str = ""
    notes: Sequence[str] = ()


def render_page(content: PageContent) -> str:
    """The HTML text."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ouro_compiler.inspection"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    charts = site_charts(content.sample)
    final = content.stages[-1].network
    errors = {name: round(snr, 1) for name, snr in content.sample.snr_db.items() if _finite(snr)}
    data = {
        **pack_stages(content.stages),
        "node_size": [NODE_WIDTH, NODE_HEIGHT],
        "views": sorted(VIEWS),
        "error": errors,
        "times": {name: float(f"{ms:.3g}") for name, ms in content.times.items()},
        "charts": charts,
    }
    return (
        environment.get_template("page.html").render(
            title=content.title,
            summary=[*_summary(content.report), *content.facts],
            stage_note=content.stage_note,
            has_error=bool(errors),
            layers=_layers(content, dict(final.nodes(data="layer"))),
            sites=_sites(content, {chart["name"] for chart in charts}),
            charts=charts,
            sizes=_sizes(content.report),
            images={"png": content.png, "note": content.png_note} if content.png else None,
            notes=[*content.report.get("notes", ()), *content.notes] or ["none"],
            data=data,
        )
        + "\n"
    )


def _summary(report: Mapping[str, Any]) -> list[str]:
    layers, size = report["layers"], report["bytes"]
    found = [f"{layers['quantized']} of {layers['total']} layers quantized"]
    if size["stored"]:
        ratio = size["fp16"] / size["stored"]
        found.append(f"{size['fp16']:,} bytes as fp16, {size['stored']:,} stored ({ratio:.2f}x)")
    if report["logits_snr_db"] is not None:
        found.append(f"logits {report['logits_snr_db']:.1f} dB on {report['snr_data']}")
    before, after = report["accuracy"]["before"], report["accuracy"]["after"]
    if after is not None:
        found.append(f"accuracy {100 * before:.2f} % before, {100 * after:.2f} % after")
    if report["outlier_share"] is not None:
        found.append(f"{100 * report['outlier_share']:.2f} % of activations were outliers")
    return found


_LAYER_COLUMNS = (
    *("layer", "kind", "status", "weight bits", "activation bits", "activations"),
    *("scale (median)", "outliers (%)", "SNR (dB)", "kernel", "ms", "reason"),
)


def _layers(content: PageContent, layer_of: Mapping[str, str | None]) -> dict[str, Any]:
    nodes = {layer: name for name, layer in layer_of.items() if layer}
    spent: dict[str, float] = {}
    for name, layer in layer_of.items():
        if layer and name in content.times:
            spent[layer] = spent.get(layer, 0.0) + content.times[name]
    rows = []
    for row in content.report["layers"]["rows"]:
        name = row["name"]
        sites = [one for one in content.report["sites"] if _belongs(one["name"], name)]
        shares = [one["outlier_share"] for one in sites if one["outlier_share"] is not None]
        snr = content.sample.snr_db.get(name)
        cells = [
            *(name, row["kind"], row["status"], row["weight_bits"], row["activation_bits"]),
            ", ".join(one["name"].removeprefix(f"{name}.") for one in sites),
            ", ".join(f"{one['scale_median']:.4g}" for one in sites),
            ", ".join(f"{100 * share:.2f}" for share in shares),
            None if snr is None else f"{snr:.1f}",
            row["kernel"] or "floating point",
            spent.get(name),
            row["reason"],
        ]
        link = f"node={quote(nodes[name], safe='')}" if name in nodes else None
        rows.append({"cells": cells, "link": link})
    note = (
        "The name leads to the layer in the graph. An activation that several layers read is a row "
        f"of the first. {content.sample_note}"
    )
    if content.times:
        note += (
            " Milliseconds are of one image, each node run by itself; a compiled model is faster "
            "than their sum."
        )
    return {"columns": _LAYER_COLUMNS, "rows": rows, "note": note.strip()}


def _belongs(site: str, layer: str) -> bool:
    return site.startswith(f"{layer}.") and "." not in site.removeprefix(f"{layer}.")


_SITE_COLUMNS = (
    *("activation", "bits", "outlier bits", "direction", "scale (least)", "scale (median)"),
    *("scale (largest)", "outliers (%)"),
)


def _sites(content: PageContent, charted: set[str]) -> dict[str, Any]:
    rows = []
    for row in content.report["sites"]:
        share = row["outlier_share"]
        cells = [
            *(row["name"], row["bits"], row["outlier_bits"]),
            "reversed" if row["reverse"] else "forward",
            *(row["scale_min"], row["scale_median"], row["scale_max"]),
            None if share is None else f"{100 * share:.2f}",
        ]
        link = f"site={quote(row['name'], safe='')}" if row["name"] in charted else None
        rows.append({"cells": cells, "link": link})
    note = "Every quantized activation; scales are over its time steps."
    if charted:
        note += f" Its name leads to its charts, of {content.sample.images} images."
    else:
        note += " There are no charts: no images were run."
    return {"columns": _SITE_COLUMNS, "rows": rows, "note": note}


def _sizes(report: Mapping[str, Any]) -> dict[str, Any]:
    size = report["bytes"]
    rows = [
        {"part": part, **row}
        for part, row in (
            *size["by_part"].items(),
            ("all", {"fp16": size["fp16"], "stored": size["stored"]}),
        )
    ]
    largest = max([1, *(max(row["fp16"], row["stored"]) for row in rows)])
    for row in rows:
        both = row["fp16"] and row["stored"]
        row["ratio"] = f"{row['fp16'] / row['stored']:.2f}x" if both else ""
        row["wide"] = round(row["fp16"] / largest * _BAR, 1)
        row["narrow"] = round(row["stored"] / largest * _BAR, 1)
    note = (
        "All parameters at 2 bytes each, against all stored parameters and scales; a file adds its "
        "graph."
    )
    return {"rows": rows, "note": note}


def _finite(value: float) -> bool:
    return math.isfinite(value)
