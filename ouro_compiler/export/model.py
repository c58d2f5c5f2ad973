"""An fx graph as an ONNX model: walk, tidy, name, describe. The same graph gives the same bytes."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

import ouro_compiler.export.fused  # importing them registers their translations
import ouro_compiler.export.layers
import ouro_compiler.export.pointwise
import ouro_compiler.export.products
import ouro_compiler.export.quantizers
import ouro_compiler.export.scans
import ouro_compiler.export.views  # noqa: F401
from ouro_compiler.errors import ModelError
from ouro_compiler.export.emitter import CONTRIB, TRANSLATIONS, Emitter, ScanForm, static
from ouro_compiler.export.functions import DOMAIN, inputs_of, outline
from ouro_compiler.graph import aten, value_of

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, ValueInfoProto

INPUT, OUTPUT, BATCH = "images", "logits", "batch"
_CHECKS = (aten._assert_tensor_metadata.default, aten._assert_scalar.default)
_IN_THE_GRAPH = (  # no functions
    torch.ops.ouro.selective_scan.default,
    torch.ops.ouro.selective_scan_dynamic_outlier.default,
)
_LARGEST = 2**31 - 1  # bytes of one protocol buffer


def to_onnx(
    gm: fx.GraphModule, *, opset: int, scan: ScanForm, metadata: Mapping[str, str]
) -> ModelProto:
    """The model of a captured, normalised or compiled graph with one input, its batch dynamic.

    metadata becomes metadata_props. Raises ModelError for ops without a translation.
    """
    from onnx import helper

    emit = Emitter(gm, opset, scan)
    _refuse_unknown(gm)
    inputs, results = _walk(emit)
    names = [OUTPUT if index == 0 else f"{OUTPUT}_{index}" for index in range(len(results))]
    for name, (result, _) in zip(names, results, strict=True):
        emit.prefix = name
        emit.add(helper.make_node("Identity", [result], [name], name=name))
    nodes, functions = outline(_used(emit, names), names, emit.unnamed, opset)
    nodes = _without_identities(nodes, {info.name for info in inputs})
    read = {name for node in nodes for name in inputs_of(node)}
    graph = helper.make_graph(
        nodes,
        "ouro",
        inputs,
        [_info(name, fake) for name, (_, fake) in zip(names, results, strict=True)],
        [tensor for name, tensor in emit.initializers.items() if name in read],
    )
    imports = [helper.make_opsetid("", opset)]
    if any(node.domain == CONTRIB for node in nodes):
        imports.append(helper.make_opsetid(CONTRIB, 1))
    if functions:
        imports.append(helper.make_opsetid(DOMAIN, 1))
    model = helper.make_model(
        graph,
        opset_imports=imports,
        ir_version=helper.find_min_ir_version_for(imports[:1]),
        functions=functions,
        producer_name="ouro_compiler",
        producer_version=metadata.get("ouro_version", ""),
    )
    helper.set_model_props(model, dict(sorted(metadata.items())))
    if model.ByteSize() > _LARGEST:
        raise ModelError("the ONNX model is over 2 GB, which one file cannot hold: quantize it")
    return model


def _refuse_unknown(gm: fx.GraphModule) -> None:
    unknown = sorted(
        {
            str(node.target)
            for node in gm.graph.nodes
            if node.op == "call_function"
            and isinstance(node.target, torch._ops.OpOverload)
            and node.target not in TRANSLATIONS
            and node.target not in _CHECKS
            and not _is_size(node)
        }
    )
    if unknown:
        raise ModelError(f"ONNX export has no translation for {', '.join(unknown)}")


def _is_size(node: fx.Node) -> bool:
    return isinstance(value_of(node), (int, bool, torch.SymInt, torch.SymBool))


def _walk(emit: Emitter) -> tuple[list[ValueInfoProto], list[tuple[str, torch.Tensor]]]:
    """Translate every node. Returns the inputs, and each result with its fake."""
    inputs: list[ValueInfoProto] = []
    for node in emit.gm.graph.nodes:
        emit.prefix = node.name
        if node.op == "placeholder":
            name = INPUT if not inputs else f"{INPUT}_{len(inputs)}"
            inputs.append(_info(name, value_of(node)))
            emit.values[node] = name
        elif node.op == "output":
            flat, _ = torch.utils._pytree.tree_flatten(node.args[0])
            return inputs, [(emit.get(one), value_of(one)) for one in flat]
        elif node.op != "call_function" or node.target in _CHECKS or _is_size(node):
            continue  # constants and sizes are emitted when they are asked for
        elif node.target is operator.getitem:
            found = emit.values[node.args[0]][node.args[1]]
            if found is not None:
                emit.values[node] = found
        else:
            emit.values[node] = TRANSLATIONS[node.target](emit, node)
    raise AssertionError("the graph has no output")


def _info(name: str, fake: torch.Tensor) -> ValueInfoProto:
    from onnx import helper

    shape: list[Any] = []
    for axis, size in enumerate(fake.shape):
        fixed = static(size)
        shape.append(fixed if fixed is not None else BATCH if axis == 0 else None)
    kind = helper.np_dtype_to_tensor_dtype(torch.empty(0, dtype=fake.dtype).numpy().dtype)
    return helper.make_tensor_value_info(name, kind, shape)


def _used(emit: Emitter, outputs: Sequence[str]) -> list[tuple[NodeProto, str, str]]:
    """The nodes that the outputs need, in order, each with its fx node and its function's name."""
    names = {
        node.name: node.target.__name__.partition(".")[0]
        for node in emit.gm.graph.nodes
        if getattr(node.target, "namespace", "") == "ouro" and node.target not in _IN_THE_GRAPH
    }
    needed, kept = set(outputs), []
    for node, owner in zip(reversed(emit.nodes), reversed(emit.owners), strict=True):
        if any(name in needed for name in node.output):
            needed.update(inputs_of(node))
            kept.append((node, owner, names.get(owner, "")))
    return kept[::-1]


def _without_identities(nodes: list[NodeProto], inputs: set[str]) -> list[NodeProto]:
    """Give the results' names to the values themselves, where a node computes just that value."""
    made = {name for node in nodes if node.op_type != "Identity" for name in node.output}
    captured = {name for node in nodes for name in inputs_of(node) if name not in node.input}
    renamed: dict[str, str] = {}
    kept = []
    for node in nodes:
        source = node.input[0] if node.op_type == "Identity" else ""
        if source in made and source not in renamed and source not in inputs | captured:
            renamed[source] = node.output[0]
        else:
            kept.append(node)
    for node in kept:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                names[index] = renamed.get(name, name)
    return kept
