"""Writing and reading `.pt2` archives, and attacks on the reader whose payloads are live."""

from __future__ import annotations

import copy
import functools
import io
import json
import os
import pickle
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ouro_compiler.archive import check_archive, read_archive, write_archive
from ouro_compiler.errors import ModelError
from ouro_compiler.models.vim import vim_micro

MANIFEST = {"schema": 1, "report": [{"layer": "head", "bits": 4}], "name": "vim"}
MODEL = "models/model.json"
WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"
SAMPLES = "data/sample_inputs/model.pt"


class Small(nn.Module):
    """A weight, a buffer, a constant, a dynamic batch, and an input that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("shift", torch.arange(2.0))
        self.constant = torch.ones(2)

    def forward(self, x: Tensor, unused: Tensor) -> Tensor:
        return (self.linear(x) + self.shift + self.constant) * x.shape[0]


def vim_program() -> ExportedProgram:
    torch.manual_seed(0)
    model = vim_micro(depth=1).eval().requires_grad_(False)
    shapes = {"images": {0: Dim("batch", min=1, max=64)}}
    return torch.export.export(model, (torch.randn(2, 1, 28, 28),), dynamic_shapes=shapes)


first_vim_program = functools.cache(vim_program)


@functools.cache
def small_program() -> ExportedProgram:
    torch.manual_seed(0)
    shapes = ({0: Dim("batch", min=1, max=64)}, None)
    inputs = (torch.randn(2, 3), torch.ones(1))
    return torch.export.export(Small().eval(), inputs, dynamic_shapes=shapes)


@functools.cache
def plain_archive() -> bytes:
    """What torch.export.save writes by itself."""
    buffer = io.BytesIO()
    torch.export.save(small_program(), buffer)
    return buffer.getvalue()


def entries(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        return {info.filename.partition("/")[2]: file.read(info) for info in file.infolist()}


def build(content: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, value in content.items():
            file.writestr(f"archive/{name}", value)
    return buffer.getvalue()


def edit(entry: str, change: Callable[[Any], Any], **added: bytes) -> bytes:
    """The plain archive with one JSON entry changed in place, and other entries set."""
    content = entries(plain_archive())
    document = json.loads(content[entry])
    change(document)
    content[entry] = json.dumps(document).encode()
    return build(content | {name.replace("__", "/"): value for name, value in added.items()})


def rename(old: str, new: str) -> bytes:
    """The plain archive with a value of the graph named otherwise, everywhere."""
    content = entries(plain_archive())
    text = content[MODEL].decode()
    assert json.dumps(old) in text
    content[MODEL] = text.replace(json.dumps(old), json.dumps(new)).encode()
    return build(content)


def graph(document: Any) -> Any:
    return document["graph_module"]["graph"]


def call(document: Any) -> Any:
    return document["graph_module"]["module_call_graph"][0]["signature"]


def last_node(document: Any) -> Any:
    return graph(document)["nodes"][-1]


class Payload:
    """Unpickling this makes a directory."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (self.marker,)


def pickled(marker: str) -> bytes:
    buffer = io.BytesIO()
    torch.save(Payload(marker), buffer)
    return buffer.getvalue()


def code(marker: str) -> str:
    return f"__import__('os').mkdir('{marker}')"


# Attacks: each takes the directory its payload makes, and returns an archive. First those that
# are live on plain torch 2.13: while the file is loaded, or once the loaded program is called.


def weight_pickle(marker: str) -> bytes:
    def change(document: Any) -> None:
        next(iter(document["config"].values())).update(use_pickle=True)

    first = json.loads(entries(plain_archive())[WEIGHTS])["config"]
    entry = next(iter(first.values()))["path_name"]
    return edit(WEIGHTS, change, **{f"data__weights__{entry}": pickled(marker)})


def constant_entry(path_name: str, payload: Callable[[str], bytes]) -> Callable[[str], bytes]:
    def attack(marker: str) -> bytes:
        meta = {"path_name": path_name, "is_param": False, "use_pickle": True, "tensor_meta": None}
        added = {f"data__constants__{path_name}": payload(marker)}
        return edit(CONSTANTS, lambda document: document["config"].update(evil=meta), **added)

    return attack


def added_entry(name: str) -> Callable[[str], bytes]:
    return lambda marker: build(entries(plain_archive()) | {name: pickled(marker)})


def legacy_format(marker: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("version", "8.20")
        file.writestr("serialized_exported_program.json", entries(plain_archive())[MODEL])
        for name in ("state_dict", "constants", "example_inputs"):
            file.writestr(f"serialized_{name}.pt", pickled(marker))
    return buffer.getvalue()


def symbolic(*path: Any) -> Callable[[str], bytes]:
    """An attack by the symbolic string that stands at this place of the graph."""

    def attack(marker: str) -> bytes:
        def change(document: Any) -> None:
            found = functools.reduce(lambda value, key: value[key], path, graph(document))
            found["as_expr"]["expr_str"] = code(marker) + " or Symbol('s0', integer=True)"

        return edit(MODEL, change)

    return attack


def symbol_name(marker: str) -> bytes:
    """Arguments of an allowed function are no less dangerous."""

    def change(document: Any) -> None:
        name = next(iter(graph(document)["sym_int_values"]))
        value = graph(document)["sym_int_values"][name]
        value["as_expr"]["expr_str"] = f"Max(Integer(1), {code(marker)} or 2)"

    return edit(MODEL, change)


def guards(marker: str) -> bytes:
    return edit(MODEL, lambda document: document.update(guards_code=[code(marker)]))


def input_name(marker: str) -> bytes:
    # `def forward(self, x, unused=<payload>)` is generated, and exec'ed, while loading
    return rename("unused", f"unused={code(marker)}")


def argument_names(marker: str) -> bytes:
    names = ["x", "unused", f"more={code(marker)}"]
    return edit(MODEL, lambda document: call(document).update(forward_arg_names=names))


def weight_name(marker: str) -> bytes:
    # `getattr(self.linear, "<name>")` is generated, without escapes
    name = f'linear.b", 0) or getattr(__import__("os"), "mkdir")("{marker}") or str("'
    content = entries(plain_archive())
    for entry in (MODEL, WEIGHTS):
        text = content[entry].decode().replace(json.dumps("linear.bias"), json.dumps(name))
        content[entry] = text.encode()
    return build(content)


def tree_import(marker: str) -> bytes:
    # a module of this name, beside the marker, makes it when it is imported
    context = [{"__enum__": True, "fqn": "evil_archive_module:x", "name": "x"}]
    spec = {"type": "builtins.dict", "context": json.dumps(context), "children_spec": []}
    return edit(MODEL, lambda document: call(document).update(in_spec=json.dumps([1, spec])))


def opened_file(marker: str) -> bytes:
    arguments = {"filename": {"as_string": marker}, "shared": {"as_bool": True}}
    return retarget("torch.ops.aten.from_file.default", {**arguments, "size": {"as_int": 8}})


def retarget(target: str, arguments: dict[str, Any]) -> bytes:
    inputs = [{"name": key, "arg": value, "kind": 1} for key, value in arguments.items()]
    return edit(MODEL, lambda document: last_node(document).update(target=target, inputs=inputs))


def argument_attack(argument: dict[str, Any]) -> Callable[[str], bytes]:
    def change(document: Any) -> None:
        last_node(document)["inputs"][1]["arg"] = argument

    return lambda marker: edit(MODEL, change)


OUTPUT = "mul"
LIVE: dict[str, tuple[Callable[[str], bytes], str]] = {
    "weight_pickle": (weight_pickle, "unpickled"),
    "constant_pickle": (constant_entry("tensor_9", pickled), "unpickled"),
    "opaque_constant": (
        constant_entry("opaque_obj_0", lambda marker: pickle.dumps(Payload(marker))),
        "unpickled",
    ),
    "legacy_weights": (added_entry("data/weights/model.pt"), "old format"),
    "legacy_constants": (added_entry("data/constants/model.pt"), "old format"),
    "legacy_format": (legacy_format, "torch 2.7"),
    "size": (symbolic("tensor_values", OUTPUT, "sizes", 0), "no plain arithmetic"),
    "symbol_value": (symbol_name, "no plain arithmetic"),
    "guards": (guards, "code that torch would run"),
    "input_name": (input_name, "identifier"),
    "argument_names": (argument_names, "identifier"),
    "weight_name": (weight_name, "dotted name"),
    "tree_import": (tree_import, "identifier"),
    "opened_file": (opened_file, "may use files"),
}
# Then those that torch 2.13 happens to stop (its verifier refuses foreign targets; torch bindings
# are unpickled by a reader that knows no Python), or that are out of place without running code.
STOPPED: dict[str, tuple[Callable[[str], bytes], str]] = {
    "custom_object": (constant_entry("custom_obj_0", pickled), "unpickled"),
    "shell": (
        lambda marker: retarget("torch.os.system", {"": {"as_string": f"mkdir {marker}"}}),
        "no op of aten or ouro",
    ),
    "saving_op": (
        lambda marker: retarget(
            "torch.ops.aten.save.default",
            {"item": {"as_tensor": {"name": "x"}}, "filename": {"as_string": marker}},
        ),
        "does not have|may use files",
    ),
    "pickle_target": (lambda marker: retarget("torch.load", {}), "no op of aten or ouro"),
    "extension_target": (lambda marker: retarget("#evil:op", {}), "no op of aten or ouro"),
    "higher_order": (lambda marker: retarget("torch.ops.higher_order.cond", {}), "control flow"),
    "unknown_op": (lambda marker: retarget("torch.ops.ouro.evil.default", {}), "does not have"),
    "internal_op": (
        lambda marker: retarget("torch.ops.aten._index_put_impl_.default", {}),
        "internal op",
    ),
    "operator_argument": (argument_attack({"as_operator": "torch.load"}), "passes an operator"),
    "subgraph": (argument_attack({"as_graph": {"name": "g", "graph": {}}}), "holds a subgraph"),
    "object_argument": (
        argument_attack({"as_custom_obj": {"name": "c", "class_fqn": "c"}}),
        "unpickled",
    ),
    "unknown_argument": (argument_attack({"as_code": "x"}), "no known kind"),
    "foreign_tree": (
        lambda marker: edit(
            MODEL,
            lambda document: call(document).update(
                out_spec='[1, {"type": "os.system", "context": "null", "children_spec": []}]'
            ),
        ),
        "use tuples, lists and dicts",
    ),
    "node_name": (
        lambda marker: edit(MODEL, lambda document: last_node(document).update(name=code(marker))),
        "identifier",
    ),
    "range_name": (
        lambda marker: edit(
            MODEL,
            lambda document: document["range_constraints"].update(
                {code(marker): {"min_val": 1, "max_val": 2}}
            ),
        ),
        "no plain arithmetic",
    ),
    "range_value": (
        lambda marker: edit(
            MODEL,
            lambda document: document["range_constraints"].update(
                s7={"min_val": code(marker), "max_val": 2}
            ),
        ),
        "instead of a 64-bit integer",
    ),
    "unknown_part": (
        lambda marker: edit(MODEL, lambda document: document.update(setup_code=code(marker))),
        "unknown part",
    ),
    "dialect": (
        lambda marker: edit(MODEL, lambda document: document.update(verifiers=["EVIL"])),
        "no dialect",
    ),
    "machine_code": (added_entry("data/aotinductor/model/model.so"), "compiled machine code"),
    "second_model": (added_entry("models/other.json"), "second model"),
    "other_folder": (added_entry("code/model.py"), "not part of a program"),
}


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a payload would make; the module that `tree_import` names can be imported."""
    made = tmp_path / "made"
    (tmp_path / "evil_archive_module.py").write_text(f"import os\nos.mkdir({str(made)!r})\n")
    monkeypatch.syspath_prepend(tmp_path)
    return made


def test_round_trip_is_bit_identical(tmp_path: Path) -> None:
    program = first_vim_program()
    write_archive(program, tmp_path / "a.pt2", MANIFEST)
    loaded, manifest = read_archive(tmp_path / "a.pt2")
    images = torch.randn(5, 1, 28, 28)
    expected = program.module(check_guards=False)(images)
    assert torch.equal(loaded.module(check_guards=False)(images), expected)
    assert manifest == MANIFEST
    assert loaded.range_constraints == program.range_constraints


def test_same_program_gives_same_bytes(tmp_path: Path) -> None:
    """In one process after other exports, in another process, and saved again after loading."""
    write_archive(first_vim_program(), tmp_path / "a.pt2", MANIFEST)
    write_archive(vim_program(), tmp_path / "other name.pt2", MANIFEST)
    script = (
        "import sys, test_archive as t\n"
        "t.write_archive(t.vim_program(), sys.argv[1], dict(reversed(t.MANIFEST.items())))"
    )
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-c", script, str(tmp_path / "elsewhere.pt2")]
    subprocess.run(command, env=environment, cwd=tmp_path, check=True)
    write_archive(read_archive(tmp_path / "a.pt2")[0], tmp_path / "again.pt2", MANIFEST)
    first = (tmp_path / "a.pt2").read_bytes()
    for name in ("other name", "elsewhere", "again"):
        assert (tmp_path / f"{name}.pt2").read_bytes() == first, name
    for word in (str(Path(__file__).parents[1]), tempfile.gettempdir(), "site-packages"):
        assert word.encode() not in first


def test_writing_changes_neither_program_nor_its_inputs(tmp_path: Path) -> None:
    program = small_program()
    before = [dict(node.meta) for node in program.graph.nodes], program.example_inputs
    write_archive(program, tmp_path / "a.pt2", {})
    assert before == ([node.meta for node in program.graph.nodes], program.example_inputs)


def test_data_behind_a_weight_stays_out(tmp_path: Path) -> None:
    """torch saves whole storages: two programs that differ in unused parts give the same file."""
    for name, fill in (("a", 0.0), ("b", 1.0)):
        storage = torch.full((10, 3), fill)
        storage[4:6] = torch.arange(6.0).view(2, 3)
        model = nn.Linear(3, 2, bias=False)
        model.weight = nn.Parameter(storage[4:6])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that it saves more than the weight
            write_archive(torch.export.export(model, (torch.ones(1, 3),)), tmp_path / name, {})
        [weight] = read_archive(tmp_path / name)[0].state_dict.values()
        assert torch.equal(weight, model.weight)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_file_of_plain_torch_is_read(tmp_path: Path) -> None:
    """With example inputs and guards, and under torch's own root folder and metadata."""

    def forward(x: Tensor, *, scale: Tensor) -> dict[str, Any]:
        y = torch.cat([x, x])[: x.shape[0] * 2 - 1]
        return {
            "out": [torch.nn.functional.gelu(y * scale, approximate="tanh")],
            "size": tuple(y.shape),
        }

    model = nn.Module()
    model.forward = forward  # type: ignore[method-assign]
    shapes = {"x": {0: Dim("batch", min=4, max=64), 1: Dim.DYNAMIC}, "scale": None}
    inputs = (torch.randn(5, 6),), {"scale": torch.ones(1)}
    program = torch.export.export(model, *inputs, dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "mine.pt2", extra_files={"notes.txt": "mine"})
    assert len(entries((tmp_path / "mine.pt2").read_bytes())[SAMPLES]) > 0
    loaded, manifest = read_archive(tmp_path / "mine.pt2")
    assert manifest is None
    x = torch.randn(9, 7)
    found = loaded.module()(x, scale=torch.ones(1))
    assert torch.equal(found["out"][0], forward(x, scale=torch.ones(1))["out"][0])
    assert found["size"] == (17, 7)


def test_honest_guards_are_dropped() -> None:
    guard = "((-2) + L['x'].size()[0] // max(1, 2)) != 1 or L['x'].stride()[1] == 1"
    data = edit(MODEL, lambda document: document.update(guards_code=[guard]))
    check_archive(data)


def test_example_inputs_are_never_unpickled(marker: Path, tmp_path: Path) -> None:
    (tmp_path / "a.pt2").write_bytes(added_entry(SAMPLES)(str(marker)))
    loaded, _ = read_archive(tmp_path / "a.pt2")
    assert loaded.example_inputs is None
    assert not marker.exists()


@pytest.mark.parametrize("name", [*LIVE, *STOPPED])
def test_attack_is_refused(name: str, marker: Path, tmp_path: Path) -> None:
    attack, reason = {**LIVE, **STOPPED}[name]
    (tmp_path / "a.pt2").write_bytes(attack(str(marker)))
    with pytest.raises(ModelError, match=reason) as caught:
        read_archive(tmp_path / "a.pt2")
    assert not marker.exists()
    assert str(caught.value).count("\n") == 0
    with pytest.raises(ModelError, match=reason):
        check_archive((tmp_path / "a.pt2").read_bytes())


def test_payloads_are_live_in_plain_torch(tmp_path: Path) -> None:
    """Else the test above would show nothing."""
    attacks = {
        **{name: attack for name, (attack, _) in LIVE.items()},
        "none": lambda _: plain_archive(),
    }
    attacks["example_inputs"] = added_entry(SAMPLES)
    for name, attack in attacks.items():
        (tmp_path / f"{name}.pt2").write_bytes(attack(str(tmp_path / name)))
    evil = f"import os\nos.mkdir({str(tmp_path / 'tree_import')!r})\n"
    (tmp_path / "evil_archive_module.py").write_text(evil)
    script = """
import sys, torch
for name in sys.argv[1:]:
    try:
        program = torch.export.load(f"{name}.pt2")
        program.module()(torch.randn(2, 3), torch.ones(1))
    except Exception:
        pass
"""
    command = [sys.executable, "-W", "ignore", "-c", script, *attacks]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    made = {name for name in attacks if (tmp_path / name).exists()}
    assert made == attacks.keys() - {"none"}


@pytest.mark.parametrize(
    "text",
    [
        "s0",
        "2*s0 - (s1 + 1)//4 % 3",
        "Add(Integer(-1), Mul(Integer(2), Symbol('s77', positive=True, integer=True)))",
        "FloorDiv(Symbol('u0', integer=True), Max(Integer(2), Pow(Symbol('s1'), Integer(2))))",
    ],
)
def test_plain_arithmetic_passes(text: str) -> None:
    def change(document: Any) -> None:
        graph(document)["sym_int_values"]["more"] = {"as_expr": {"expr_str": text, "hint": None}}

    check_archive(edit(MODEL, change))


@pytest.mark.parametrize(
    "text",
    [
        "evil",
        "os",
        "s0.real",
        "s0[0]",
        "'s0'",
        "lambda: s0",
        "[s0 for s0 in (1,)]",
        "Max(*s0)",
        "Integer('1')",
        "Symbol('s0', cls=s0)",
        "Symbol('evil name')",
        "Symbol('s0', **s1)",
        "sympify('1')",
        "(s0)(s1)",
        "9**9**9",
        "Pow(Integer(9), Integer(999999999))",
        "Pow(Pow(Integer(9), Integer(4)), Integer(4))",
        "1.5",
        "True",
        "s0 if s1 else s2",
        "(s0 := s1)",
        "-" * 5000 + "s0",
        "s0+" * 5000 + "s0",
        "",
        "s0\nimport os",
    ],
)
def test_other_expressions_are_refused(text: str) -> None:
    def change(document: Any) -> None:
        graph(document)["sym_int_values"]["more"] = {"as_expr": {"expr_str": text, "hint": None}}

    with pytest.raises(ModelError):
        check_archive(edit(MODEL, change))


def change_weight(**meta: Any) -> bytes:
    def change(document: Any) -> None:
        document["config"]["linear.weight"]["tensor_meta"].update(copy.deepcopy(meta))

    return edit(WEIGHTS, change)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (lambda: change_weight(storage_offset={"as_int": 1}), "needs more than"),
        (lambda: change_weight(storage_offset={"as_int": -1}), "negative"),
        (lambda: change_weight(strides=[{"as_int": -3}, {"as_int": 1}]), "negative"),
        (lambda: change_weight(strides=[{"as_int": 2**40}, {"as_int": 1}]), "needs more than"),
        (lambda: change_weight(strides=[{"as_int": 1}]), "sizes and 1 strides"),
        (lambda: change_weight(sizes=[{"as_int": 2**62}] * 2), "needs more than"),
        (lambda: change_weight(sizes=[{"as_int": 10**30}] * 2), "64-bit integer"),
        (lambda: change_weight(sizes=[{"as_int": 6}, {"as_int": 1}]), "needs more than"),
        (lambda: change_weight(sizes=[{"as_int": 1}, {"as_int": 3}]), "differs from"),
        (lambda: change_weight(dtype=1), "differs from"),
        (lambda: change_weight(dtype=99), "data type"),
        (lambda: change_weight(layout=1), "dense layout"),
        (lambda: change_weight(device={"type": "evil", "index": None}), "kind of device"),
        (lambda: edit(WEIGHTS, lambda d: None, data__weights__weight_0=b"123"), "needs more|fit"),
        (lambda: edit(WEIGHTS, lambda d: None, data__weights__weight_0=b""), "needs more"),
        (lambda: edit(WEIGHTS, lambda d: d["config"].pop("linear.weight")), "missing"),
        (
            lambda: edit(WEIGHTS, lambda d: d["config"]["shift"].update(path_name="weight_77")),
            "missing",
        ),
        (
            lambda: edit(WEIGHTS, lambda d: d["config"]["shift"].update(path_name="../x")),
            "raw tensor data",
        ),
    ],
)
def test_weights_stay_inside_their_entries(data: Callable[[], bytes], reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        check_archive(data())


def test_zip_tricks_are_refused() -> None:
    content = entries(plain_archive())
    check_archive(build(content))
    with pytest.raises(ModelError, match="compressed"):
        check_archive(build(content | {"extra/bomb": bytes(10**6)}, zipfile.ZIP_DEFLATED))
    with pytest.raises(ModelError, match="outside the root folder"):
        check_archive(build(content).replace(b"archive/byteorder", b"another/byteorder"))
    twins = build(content | {"extra/twin0": b"", "extra/twin1": b""})
    with pytest.raises(ModelError, match="twice"):
        check_archive(twins.replace(b"twin1", b"twin0"))
    with pytest.raises(ModelError, match="not part of a program"):
        check_archive(build(content | {"../../escape": b""}))
    with pytest.raises(ModelError, match="lacks archive_format"):
        check_archive(
            build({key: value for key, value in content.items() if key != "archive_format"})
        )
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(1)}, buffer)
    with pytest.raises(ModelError, match=r"torch\.save"):
        check_archive(buffer.getvalue())


def test_deep_nesting_is_refused() -> None:
    deep = "[" * 100_000 + "]" * 100_000
    for data in (
        build(entries(plain_archive()) | {MODEL: deep.encode()}),
        edit(MODEL, lambda document: call(document).update(in_spec=f"[1, {deep}]")),
    ):
        with pytest.raises(ModelError):
            check_archive(data)


@pytest.mark.parametrize("kept", [0, 1, 100, 0.3, 0.9, -1])
def test_cut_file_is_refused(kept: float, tmp_path: Path) -> None:
    data = plain_archive()
    length = int(kept * len(data)) if isinstance(kept, float) else kept
    (tmp_path / "a.pt2").write_bytes(data[:length])
    with pytest.raises(ModelError, match="damaged, cut short"):
        read_archive(tmp_path / "a.pt2")


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.pt2").write_text("no archive\n" * 50)
    with pytest.raises(ModelError, match=r"no \.pt2 archive"):
        read_archive(tmp_path / "text.pt2")
    with pytest.raises(ModelError, match="no such file"):
        read_archive(tmp_path / "missing.pt2")
    with pytest.raises(ModelError, match="no regular file"):
        read_archive(tmp_path)


def test_what_torch_cannot_load_is_one_sentence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def change(document: Any) -> None:
        last_node(document)["inputs"][1]["arg"] = {"as_tensor": {"name": "nowhere"}}

    (tmp_path / "a.pt2").write_bytes(edit(MODEL, change))
    with pytest.raises(ModelError, match=r"cannot load it .*nowhere") as caught:
        read_archive(tmp_path / "a.pt2")
    assert "Traceback" not in str(caught.value) + caplog.text


def test_manifest_must_be_an_object(tmp_path: Path) -> None:
    for text in (b"[]", b"{", b"\xff"):
        (tmp_path / "a.pt2").write_bytes(
            build(entries(plain_archive()) | {"extra/ouro.json": text})
        )
        with pytest.raises(ModelError, match=r"ouro\.json"):
            read_archive(tmp_path / "a.pt2")


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.data())
def test_flipped_bytes_raise_nothing_but_model_error(data: st.DataObject) -> None:
    """In the JSON of a sound zip file, so that no checksum hides the damage; and in the file."""
    content = entries(plain_archive())
    entry = data.draw(st.sampled_from([MODEL, MODEL, WEIGHTS, CONSTANTS, "archive_version", None]))
    text = bytearray(plain_archive() if entry is None else content[entry])
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(text) - 1))
        text[place] = data.draw(st.sampled_from(b'0123456789azs{}[]",:- \x00\xff'))
    archive = bytes(text) if entry is None else build(content | {entry: bytes(text)})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.pt2"
        path.write_bytes(archive)
        with suppress(ModelError):
            read_archive(path)


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.pt2"
    write_archive(small_program(), path, MANIFEST)
    before = path.read_bytes()

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(ModelError, match="No space left"):
            write_archive(small_program(), path, {})
    with pytest.raises(ValueError, match="JSON"):
        write_archive(small_program(), path, {"nan": float("nan")})
    with pytest.raises(ModelError, match="cannot write"):
        write_archive(small_program(), tmp_path / "no folder" / "a.pt2", {})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.pt2"]


def test_what_could_not_be_read_is_not_written(tmp_path: Path) -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with torch.set_grad_enabled(False):
                return x * 2

    x = torch.ones(2, requires_grad=True)
    program = torch.export.export(Branch(), (x,))
    with pytest.raises(ModelError, match=r"cannot save this program.*torch\.no_grad\(\)"):
        write_archive(program, tmp_path / "a.pt2", {})
    assert os.listdir(tmp_path) == []
