"""`ouro inspect --html`: the page holds the whole truth, loads nothing, and works in a browser."""

from __future__ import annotations

import base64
import json
import re
from functools import lru_cache
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ouro_compiler as ouro
from ouro_compiler.cli import main
from ouro_compiler.evaluation import OutlierCounter, snr_db
from ouro_compiler.inspection.charts import heat_cells
from ouro_compiler.inspection.layout import NODE_WIDTH, lay_out
from ouro_compiler.inspection.network import build_network, fold_network
from ouro_compiler.inspection.nodes import node_rows
from ouro_compiler.inspection.packing import pack_stages
from ouro_compiler.inspection.page import PageContent, render_page
from ouro_compiler.inspection.probe import Sample, measure, time_nodes
from ouro_compiler.inspection.stages import Stage, StageRecorder
from ouro_compiler.passes import NORMALIZE, PIPELINE
from ouro_compiler.passes.base import pass_name
from ouro_compiler.runtime.compiled_model import CompiledModel
from tests import browser
from tests.command_line import Cli, cli, refused  # noqa: F401
from tests.models import compiled_vim, images, small_vim

NAMES = [pass_name(one) for one in PIPELINE]


class Found(HTMLParser):
    """Tags with their attributes, text by element, tables as lists of rows."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.script = ""
        self._table = ""
        self._cell = self._data = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = dict(attrs)
        self.tags.append((tag, known))
        if tag == "table":
            self._table = known.get("id") or "other"
        if tag == "tr":
            self.tables.setdefault(self._table, []).append([])
        if tag in ("td", "th"):
            self.tables[self._table][-1].append("")
            self._cell = True
        self._data = tag == "script" and known.get("id") == "data"

    def handle_endtag(self, tag: str) -> None:
        self._cell = self._cell and tag not in ("td", "th")
        self._data = False

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.tables[self._table][-1][-1] += data
        if self._data:
            self.script += data


@lru_cache
def compiled() -> tuple[CompiledModel, StageRecorder]:
    recorder = StageRecorder(keep=pass_name(NORMALIZE[-1]))
    model = ouro.compile(small_vim(2), images(2), calibration=images(), on_pass=recorder)
    return model, recorder


@lru_cache
def sample() -> Sample:
    model, recorder = compiled()
    return measure(model.graph_module, images().split(4), recorder.kept)


def content(**changes: Any) -> PageContent:
    model, recorder = compiled()
    network = build_network(model.graph_module)
    stages = [*recorder.stages, Stage(name="compiled", changed=True, network=network)]
    known = {
        "title": "small",
        "stages": stages,
        "stage_note": "all",
        "report": model.report,
        "sample": sample(),
    }
    return PageContent(**{**known, **changes})


@lru_cache
def page() -> str:
    return render_page(content())


def test_stages_are_those_of_the_pipeline() -> None:
    _, recorder = compiled()
    assert [stage.name for stage in recorder.stages] == ["capture", *NAMES]
    changed = [stage.name for stage in recorder.stages if stage.changed]
    assert "insert_quantize_dequantize" in changed
    assert "insert_fake_quantize" not in changed


def test_packed_stages_hold_every_node_and_edge() -> None:
    given = content().stages
    packed = json.loads(json.dumps(pack_stages(given)))
    names, facts = packed["names"], packed["facts"]
    for stage, row in zip(given, packed["stages"], strict=True):
        network = fold_network(stage.network)
        nodes, edges = {}, {}
        for block, layout, members in row["groups"]:
            _, _, places, bends = packed["layouts"][layout]
            assert len(places) == 2 * len(members)
            assert all(max(bend[:2]) < len(members) for bend in bends)
            for number in members:
                name, known, inputs, lines = packed["records"][number]
                nodes[names[name]] = {names[facts[one][0]]: facts[one][1] for one in known}
                assert nodes[names[name]].get("block") == (None if block < 0 else names[block])
                pairs = zip(inputs[::2], inputs[1::2], strict=True)
                edges.update({(names[a], names[name]): names[b] for a, b in pairs})
                assert all(names[line] is not None for line in lines)
        assert nodes.keys() == set(network)
        shown = {name: {**data} for name, data in network.nodes(data=True)}
        for name, data in nodes.items():
            assert data.keys() == shown[name].keys()
            for key, value in data.items():
                exact = shown[name][key]
                float_ = isinstance(exact, float)
                assert value == (pytest.approx(exact, rel=1e-3) if float_ else exact)
        assert edges == {(a, b): of for a, b, of in network.edges(data="argument")}


def test_equal_blocks_share_a_layout() -> None:
    network = build_network(compiled_vim(depth=2).graph_module)
    packed = pack_stages([Stage(name="one", changed=True, network=network)])
    groups = packed["stages"][0]["groups"]
    layouts = [layout for block, layout, _ in groups if block >= 0]
    assert len(layouts) == 2
    assert len(packed["layouts"]) < len(groups) or len(set(layouts)) == 2


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 14), st.integers(0, 14)), max_size=40))
def test_layouts_do_not_overlap(pairs: list[tuple[int, int]]) -> None:
    network = nx.DiGraph()
    network.add_nodes_from(range(15))
    network.add_edges_from((a, b) for a, b in pairs if a < b)
    found = lay_out(network)
    rows: dict[int, list[int]] = {}
    for x, y in found.nodes.values():
        assert NODE_WIDTH // 2 <= x <= found.width - NODE_WIDTH // 2 + 1
        rows.setdefault(y, []).append(x)
    for row in rows.values():
        row.sort()
        assert all(b - a >= NODE_WIDTH for a, b in pairwise(row))
    for (source, user), bends in found.edges.items():
        heights = [found.nodes[source][1], *(y for _, y in bends), found.nodes[user][1]]
        assert heights == sorted(set(heights))
    assert lay_out(network) == found


def test_outliers_are_those_that_the_counter_counts() -> None:
    model, _ = compiled()
    counter = OutlierCounter(model.graph_module)
    with torch.no_grad():
        counter.run(images())
    assert sample().sites.keys() == counter.counts.keys()
    for name, site in sample().sites.items():
        assert site.listed is not None
        assert float(site.listed.mean()) == pytest.approx(counter.shares()[name], abs=1e-12)
        listed, total = counter.counts[name]
        assert (int(site.outliers.sum()), int(site.inliers.sum())) == (listed, total - listed)
        used = site.inliers.nonzero().flatten() - 128
        assert int(used.min()) >= -8
        assert int(used.max()) <= 7
    assert any(
        float(site.listed.max()) > 0 for site in sample().sites.values() if site.listed is not None
    )


def test_errors_are_of_the_layers_outputs() -> None:
    """The last layer's output is the model's, and the quantized model's by another road."""
    model, _ = compiled()
    wanted = snr_db(small_vim(2)(images()), model(images()))
    assert sample().snr_db["head"] == pytest.approx(wanted, abs=0.05)
    rows = {row["name"] for row in model.report["layers"]["rows"]}
    assert sample().snr_db.keys() == rows
    assert measure(model.graph_module, [images(2)]).snr_db == {}


@pytest.mark.parametrize("zero", [None, 3.0])
def test_simulated_quantizers_are_counted_too(zero: float | None) -> None:
    """`fake_quantize` stores no codes: they are counted as it would have stored them."""
    owner = torch.nn.Module()
    owner.add_module("layer", torch.nn.Module())
    owner.layer.register_buffer("scale", torch.tensor([0.5], dtype=torch.float16))
    owner.layer.register_buffer("zero", torch.tensor([zero or 0.0]))
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    stored = graph.get_attr("layer.scale")
    scale = graph.call_function(torch.ops.aten.to.dtype, (stored, torch.float32))
    given = None if zero is None else graph.get_attr("layer.zero")
    op = torch.ops.ouro.fake_quantize.default
    graph.output(graph.call_function(op, (x, scale, given, 4)))
    gm = torch.fx.GraphModule(owner, graph)
    row = node_rows(gm)[-1]
    assert (row["site"], row["bits"], row["outlier_share"]) == ("layer", 4, None)
    values = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(1))
    found = measure(gm, [values]).sites["layer"]
    codes = np.round(values.numpy().astype(np.float64) / 0.5)
    codes = np.clip(codes, -7, 7) if zero is None else np.clip(codes + zero, 0, 15) - 8
    wanted = np.bincount((codes + 128).astype(int).ravel(), minlength=256)
    assert found.inliers.tolist() == wanted.tolist()
    assert (found.listed, int(found.outliers.sum())) == (None, 0)


def test_heat_cells_keep_what_is_rare() -> None:
    listed = torch.zeros(197, 384, dtype=torch.float64)
    listed[100, 200] = 1 / 128
    cells = heat_cells(listed)
    assert cells.shape == (48, 96)
    assert int((cells > 0).sum()) in (1, 2)  # windows of the pooling may overlap by a step
    assert torch.equal(heat_cells(torch.ones(3, 5)), torch.full((3, 5), 255, dtype=torch.uint8))


def test_every_node_is_timed() -> None:
    model, _ = compiled()
    times = time_nodes(model.graph_module, images(1), rounds=2)
    calls = {node.name for node in model.graph_module.graph.nodes if node.op == "call_function"}
    assert times.keys() == calls
    assert all(ms > 0 for ms in times.values())


def test_tables_say_what_the_report_says() -> None:
    found, report = Found(page()), compiled()[0].report
    head, *rows = found.tables["layers-table"]
    assert head[0] == "layer"
    assert [row[0] for row in rows] == [row["name"] for row in report["layers"]["rows"]]
    reasons = {row[0]: row[-1] for row in rows}
    assert all(reasons[row["name"]] == (row["reason"] or "") for row in report["layers"]["rows"])
    snr = {row[0]: row[head.index("SNR (dB)")] for row in rows}
    assert snr == {name: f"{value:.1f}" for name, value in sample().snr_db.items()}
    sites = found.tables["sites-table"][1:]
    assert [row[0] for row in sites] == [row["name"] for row in report["sites"]]
    stored = {row[0]: row[2] for row in found.tables["other"][1:]}
    assert stored["all"] == f"{report['bytes']['stored']:,}"
    links = {of["href"] for tag, of in found.tags if tag == "a"}
    nodes = {names for stage in content().stages[-1:] for names in stage.network}
    named = {link.removeprefix("#node=") for link in links if link and link.startswith("#node=")}
    assert len(named) == len(rows)
    assert named <= nodes


def test_the_page_needs_nothing_else() -> None:
    found = Found(page())
    assert not [tag for tag, _ in found.tags if tag in ("link", "iframe", "object", "base")]
    sources = [of[key] for _, of in found.tags for key in ("src", "href", "action") if key in of]
    assert all(one and (one.startswith("#") or one.startswith("data:")) for one in sources)
    assert set(re.findall(r"https?://[^\s\"'<)]+", page())) == {"http://www.w3.org/2000/svg"}
    policy = next(of["content"] for tag, of in found.tags if of.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "@media (prefers-color-scheme: dark)" in page()


def test_same_model_same_bytes() -> None:
    model, recorder = compiled()
    again = measure(model.graph_module, images().split(4), recorder.kept)
    assert render_page(content(sample=again)) == page()


ODD = "</script><script>window.evil=1</script><img src=x onerror=evil()>\"'&{{7*7}}\u2028"


def odd_page() -> str:
    report = json.loads(json.dumps(compiled()[0].report))
    report["layers"]["rows"][1]["name"] = ODD
    report["layers"]["rows"][1]["reason"] = ODD
    report["sites"][0]["name"] = ODD
    report["notes"] = [ODD]
    network = nx.DiGraph()
    network.add_node(ODD, op=ODD, layer=ODD, block=f"{ODD}.0", site=ODD, kernel=ODD)
    network.add_node("end", op="output")
    network.add_edge(ODD, "end", argument=ODD)
    odd = Sample(images=1, sites={ODD: sample().sites["layers.0.mixer.in_proj.input"]})
    stages = [Stage(name=ODD, changed=True, network=network)]
    return render_page(content(title=ODD, stages=stages, report=report, sample=odd))


def test_names_are_text() -> None:
    found = Found(odd_page())
    assert [of for tag, of in found.tags if tag == "img"] == []
    assert sum(tag == "script" for tag, _ in found.tags) == 2
    assert "window.evil" in found.tables["layers-table"][2][0]
    data = json.loads(found.script)
    assert data["stages"][0]["name"] == ODD
    assert ODD in data["names"]


def test_command_on_an_artefact(cli: Cli) -> None:  # noqa: F811
    compiled_vim().save("vim.pt2")
    result = cli("inspect", "vim.pt2", "--html", "a.html", "--images", "3", entry=main)
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith("a.html: ")
    text = Path("a.html").read_text()
    assert "An artefact holds the compiled graph alone" in text
    assert "errors against floating point" in text
    data = json.loads(Found(text).script)
    assert [stage["name"] for stage in data["stages"]] == ["compiled"]
    assert data["error"] == {}
    assert data["charts"]
    assert cli("inspect", "vim.pt2", "--html", "b.html", "--images", "3", entry=main).code == 0
    assert Path("b.html").read_text() == text
    assert cli("inspect", "vim.pt2", "--html", "c.html", "--time", entry=main).code == 0
    assert json.loads(Found(Path("c.html").read_text()).script)["times"]
    assert not list(Path().glob("*.partial"))


def test_command_on_a_model(cli: Cli) -> None:  # noqa: F811
    args = ("vim.safetensors", "--html", "m.html", "--calibration", "images.npz", "--images", "4")
    result = cli("inspect", *args, "--preset", "w8a8", entry=main)
    assert (result.code, result.err) == (0, "")
    found = Found(Path("m.html").read_text())
    data = json.loads(found.script)
    stages = [stage["name"] for stage in data["stages"]]
    assert stages == ["capture", *NAMES, "lowering and export"]
    assert data["error"]
    assert {row[3] for row in found.tables["layers-table"][1:] if row[2] == "quantized"} == {"8"}
    (picture,) = [of["src"] for tag, of in found.tags if tag == "img"]
    assert picture is not None
    assert base64.b64decode(picture.partition(",")[2]).startswith(b"\x89PNG")


def test_page_of_another_recipe(cli: Cli) -> None:  # noqa: F811
    args = ("vim.safetensors", "--html", "m.html", "--calibration", "images.npz", "--images", "4")
    how = ("--recipe", "ptq4vm", "--set", "weights.bits=8", "--set", "ssm=none")
    assert cli("inspect", *args, *how, entry=main).code == 0
    found = Found(Path("m.html").read_text())
    rows = found.tables["layers-table"][1:]
    assert {row[2] for row in rows if row[1] == "scan"} == {"skipped"}
    assert {row[3] for row in rows if row[2] == "simulated"} == {"8"}
    after = ("vim.safetensors", "--after", "insert_fake_quantize", *how)
    simulated = "ouro.fake_quantize"
    assert simulated in cli("inspect", *after, entry=main).out
    assert simulated not in cli("inspect", *after[:3], entry=main).out


def test_an_artefact_has_its_configuration(cli: Cli) -> None:  # noqa: F811
    compiled_vim().save("kept.ouro")
    for how in (("--preset", "w8a8"), ("--recipe", "rtn"), ("--set", "ssm=none")):
        refused(cli("inspect", "kept.ouro", *how, entry=main), 2, "are for models")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--html", "no/such/a.html"), "no file in an existing folder"),
        (("--html", "a.html", "--after", NAMES[0]), "leave out --format, --after, --block"),
        (("--html", "a.html", "--format", "json"), "leave out --format, --after, --block"),
        (("--html", "a.html", "--preset", "w5a5"), "the presets are w4a4"),
        (("--html", "a.html", "--calibration", "nothing.npz"), "it does not exist"),
        (("--images", "3"), "--images is for --html and --trace"),
        (("--time",), "--time is for --html"),
        (("--recipe", "gptq"), "gptq"),
        (("--set", "weights.bits=4 bits"), "weights.bits"),
        (("--trace", "t.json"), "--trace runs an artefact"),
    ],
)
def test_bad_options_exit_2(cli: Cli, args: tuple[str, ...], words: str) -> None:  # noqa: F811
    refused(cli("inspect", "vim.safetensors", *args, entry=main), 2, words)
    assert not list(Path().glob("*.html"))


def test_trace_of_an_artefact(cli: Cli, tmp_path: Path) -> None:  # noqa: F811
    model = compiled_vim()
    model.save("traced.pt2")
    result = cli("inspect", "traced.pt2", "--trace", "t.json", "--images", "2", entry=main)
    assert (result.code, result.out.strip()) == (0, "t.json")
    events = json.loads(Path("t.json").read_text())["traceEvents"]
    ranges = [one["name"] for one in events if one.get("cat") == "user_annotation"]
    calls = [node.name for node in model.graph_module.graph.nodes if node.op == "call_function"]
    order = [one.split(" ")[0] for one in ranges if one.split(" ")[0] in calls]
    assert order == sorted(set(order), key=calls.index)
    layers = {one.split(" ")[1] for one in ranges if " " in one}
    rows = {row["name"] for row in model.report["layers"]["rows"]}
    assert rows <= layers
    refused_name = cli("inspect", "traced.pt2", "--trace", "t.txt", entry=main)
    assert (refused_name.code, "call it .json" in refused_name.err) == (2, True)
    assert torch.equal(model.traced(images(2)), model(images(2)))


def test_preprocessing_is_the_artefacts_own(cli: Cli) -> None:  # noqa: F811
    """Images of another shape than the artefact takes are refused, not resized."""
    compiled_vim().save("vim.pt2")
    np.savez("other.npz", images=np.zeros((2, 1, 32, 32), np.float32))
    result = cli("inspect", "vim.pt2", "--html", "a.html", "--calibration", "other.npz", entry=main)
    assert (result.code, "must have shape (n, 1, 28, 28)" in result.err) == (2, True)


# In a browser

SCRIPT = """
const all = (what) => [...document.querySelectorAll(what)];
const found = {}, settle = () => new Promise((done) => setTimeout(done, 100));
found.folded = [all("#canvas .node").length, all("#canvas .block").length];
document.querySelector("#unfold").click();
found.unfolded = all("#canvas .node").length;
document.querySelector("#fold").click();
const block = all("#canvas .block")[1];
block.dispatchEvent(new KeyboardEvent("keydown", {key: "Enter", bubbles: true}));
found.one = all("#canvas .node").length;
found.expanded = all("#canvas .block").map((one) => one.getAttribute("aria-expanded"));
const search = document.querySelector("#search");
search.value = "layers.0.mixer.out_proj";
search.dispatchEvent(new Event("input"));
found.results = all("#results button").length;
search.dispatchEvent(new KeyboardEvent("keydown", {key: "Enter"}));
found.chosen = document.querySelector("#details h3").textContent;
found.focus = document.activeElement.dataset.name;
const before = document.activeElement.dataset.name;
document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowUp", bubbles: true}));
found.moved = document.activeElement.dataset.name !== before;
all("#stages button").find((one) => one.textContent.startsWith("fuse_quantize_prologue")).click();
found.stage = document.querySelector("#change h3").textContent;
found.added = all("#canvas .node.added").length + all("#canvas .block").length;
document.querySelector("input[value=before]").click();
document.querySelector("#unfold").click();
found.removed = all("#canvas .node.removed").length;
document.querySelector("input[value=after]").click();
const link = document.querySelector("#layers-table tbody tr:nth-child(3) a");
link.click();
await settle();
found.linked = document.querySelector("#details").textContent.includes(link.textContent);
document.querySelector("#colour").value = "error";
document.querySelector("#colour").dispatchEvent(new Event("change"));
found.coloured = all("#canvas .node rect").filter((one) => one.style.fill.startsWith("rgb")).length;
const filter = document.querySelector("[data-filter=layers-table]");
filter.value = "selective_scan";
filter.dispatchEvent(new Event("input"));
found.filtered = all("#layers-table tbody tr").filter((one) => !one.hidden).length;
const sort = document.querySelector("#sites-table [data-sort='5']");
sort.click();
found.sorted = all("#sites-table tbody tr").map((one) => Number(one.cells[5].textContent));
location.hash = "site=layers.1.mixer.x_proj.input";
await settle();
found.site = document.querySelector("#site-charts h3").textContent;
found.charts = [all("#site-charts canvas").length, all("#site-charts svg").length];
return found;
"""


def test_the_page_works_in_a_browser(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(page())
    result = browser.in_browser(path, SCRIPT)
    assert (result["console"], result["error"]) == ([], None)
    found = result["value"]
    network = fold_network(content().stages[-1].network)
    inside = [name for name, block in network.nodes(data="block") if block]
    assert found["folded"] == [len(network) - len(inside), 2]
    assert found["unfolded"] == len(network)
    assert found["one"] == len(network) - len(inside) // 2
    assert found["expanded"] == ["false", "true"]
    assert found["results"] >= 2
    assert found["chosen"] == found["focus"]
    assert network.nodes[found["chosen"]]["op"].startswith("ouro.")
    assert found["moved"]
    assert found["stage"] == "fuse_quantize_prologue"
    packed = pack_stages(content().stages)
    number = [stage["name"] for stage in packed["stages"]].index("fuse_quantize_prologue")
    assert found["removed"] == len(packed["stages"][number]["diff"]["removed"]) > 0
    assert found["linked"]
    assert found["coloured"] > 0
    assert found["filtered"] == 4
    assert found["sorted"] == sorted(found["sorted"])
    assert found["site"] == "layers.1.mixer.x_proj.input"
    assert found["charts"] == [1, 2]


def test_odd_names_run_no_code(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(odd_page())
    script = (
        "document.querySelector('#unfold').click();"
        "const click = new MouseEvent('click', {bubbles: true});"
        "document.querySelector('#canvas .node').dispatchEvent(click);"
        "const s = document.querySelector('#search'); s.value = 'evil';"
        "s.dispatchEvent(new Event('input'));"
        "return [window.evil ?? null, document.querySelector('#details h3').textContent,"
        "document.querySelectorAll('#results button').length, document.images.length]"
    )
    result = browser.in_browser(path, script)
    assert (result["console"], result["error"]) == ([], None)
    assert result["value"] == [None, ODD, 1, 0]
