"""Reports as tables, and what differs between two reports or two graphs."""

from __future__ import annotations

import csv
import io
import json
from html.parser import HTMLParser
from itertools import pairwise

import networkx as nx
import pytest
import rich.console

import ouro_compiler as ouro
from ouro_compiler.config import QuantConfig
from ouro_compiler.errors import UsageError
from ouro_compiler.inspection import diff
from ouro_compiler.inspection.network import build_network
from ouro_compiler.inspection.stages import StageRecorder
from ouro_compiler.report_view import TABLES, ReportView
from tests.models import compiled_vim, images, small_vim


def test_a_report_is_still_its_dictionary() -> None:
    compiled = compiled_vim()
    assert isinstance(compiled.report, dict)
    assert json.loads(json.dumps(compiled.report)) == compiled.report
    assert compiled.report is compiled.manifest["report"]
    assert compiled.report["schema_version"] == 1


def test_tables_hold_the_rows() -> None:
    report = compiled_vim().report
    layers = report.table("layers")
    assert layers.column("name") == [row["name"] for row in report["layers"]["rows"]]
    assert layers.records()[1]["weight_bits"] == 4
    assert len(report.table("sites")) == len(report["sites"])
    stored = report.table("bytes").column("stored")
    assert sum(stored) == report["bytes"]["stored"]
    rows = list(csv.DictReader(io.StringIO(report.table("sites").to_csv())))
    exact = [float(row["scale_median"]) for row in rows]
    assert exact == [row["scale_median"] for row in report["sites"]]
    assert [table.name for table in report.tables()] == list(TABLES)
    head, *lines = str(layers).splitlines()
    assert all(line[: head.index("kind")].strip() in layers.column("name") for line in lines)
    with pytest.raises(KeyError, match="layers, sites, kernels"):
        report.table("rows")
    with pytest.raises(KeyError, match="weight_bits"):
        layers.column("bits")


class Cells(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text.append(data)


ODD = "[red]a[/red]<script>x</script>&amp;"


def test_names_are_text_wherever_they_are_shown() -> None:
    plain = json.loads(json.dumps(compiled_vim().report))
    plain["layers"]["rows"][0]["name"] = ODD
    report = ReportView(plain)
    cells = Cells(report._repr_html_())
    assert set(cells.tags) == {"table", "caption", "thead", "tbody", "tr", "th", "td"}
    assert ODD in cells.text
    assert cells.text.count("layers.0.mixer.in_proj") == 1
    console = rich.console.Console(width=300, file=io.StringIO(), color_system=None)
    console.print(report)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert ODD in shown
    assert all(row["name"] in shown for row in plain["sites"])


def test_a_report_without_measurements_is_shown() -> None:
    """What a dry run writes."""
    from ouro_compiler.report import Report

    report = ReportView(Report(config=QuantConfig().to_dict()).to_dict())
    assert len(report.table("layers")) == 0
    assert set(Cells(report._repr_html_()).text) >= {"0 of 0 quantized"}


def test_reports_differ_where_configurations_do() -> None:
    before, after = compiled_vim(), compiled_vim(ouro.W8A8)
    found = diff(before, after)
    changed = {name: set(change) for name, change in found.changed.items()}
    assert "weight_bits" in changed["layers.0.mixer.in_proj"]
    assert found.changed["layers.0.mixer.in_proj"]["weight_bits"] == (4, 8)
    assert found.totals["bytes stored"][0] < found.totals["bytes stored"][1]
    assert (found.added, found.removed) == ([], [])
    assert "patch_embed.proj" not in changed
    assert diff(before.report, after.report) == found
    assert "~ layers.0.mixer.in_proj: weight_bits 4 -> 8" in str(found)
    without = compiled_vim(QuantConfig(ssm="none"))
    assert {name.rpartition(".")[2] for name in diff(before, without).removed} == {
        "delta",
        "B",
        "C",
    }
    assert not diff(before, before)
    assert str(diff(before, before)) == "no difference"


def test_graphs_differ_where_passes_changed_them() -> None:
    recorder = StageRecorder()
    compiled = ouro.compile(small_vim(), images(2), calibration=images(), on_pass=recorder)
    for before, after in pairwise(recorder.stages):
        found = diff(before.network, after.network)
        assert bool(found) == after.changed, after.name
        sizes = (len(before.network), len(after.network))
        assert (
            len(found.added) - len(found.removed) == sizes[1] - sizes[0] == sum(found.ops.values())
        )
    inserted = next(s for s in recorder.stages if s.name == "insert_quantize_dequantize")
    place = recorder.stages.index(inserted)
    found = diff(recorder.stages[place - 1].network, inserted.network)
    assert found.ops["ouro.quantize_dynamic_outlier"] == len(compiled.report["sites"])
    assert found.removed == []


def test_renamed_nodes_are_the_same() -> None:
    """Storing and loading renames nodes at most."""
    compiled = compiled_vim()
    network = build_network(compiled.graph_module)
    names = {name: f"other_{index}" for index, name in enumerate(network)}
    found = diff(network, nx.relabel_nodes(network, names))
    assert not found
    assert found.renamed == names
    assert not diff(compiled.graph_module, network)


def test_what_cannot_be_compared_is_refused() -> None:
    compiled = compiled_vim()
    with pytest.raises(UsageError, match="two of one kind"):
        diff(compiled.graph_module, compiled.report)
    with pytest.raises(UsageError, match=r"docs/report\.md"):
        diff({"a": 1}, compiled.report)
    with pytest.raises(UsageError, match="int cannot be compared"):
        diff(3, compiled)
