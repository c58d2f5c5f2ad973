"""Model-local functions: what one op of ours became is one call, and equal bodies are stored once.

A quantizer is some twenty ONNX nodes and a model has hundreds of them, equal but for their
operands. Runtimes put the bodies in place of the calls when they load the model. Scans are left in
the graph, where everyone sees them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnx import FunctionProto, ModelProto, NodeProto, TensorProto

DOMAIN = "ouro"
_FEWEST = 3  # nodes worth a function


def outline(
    nodes: Sequence[tuple[NodeProto, str, str]],
    outputs: Iterable[str],
    constants: dict[str, TensorProto],
    opset: int,
) -> tuple[list[NodeProto], list[FunctionProto]]:
    """Replace nodes by calls. Returns the graph's nodes, and the functions.

    nodes: each with the name of the fx node it is of, and what functions of that are called ("" for
    none). constants: small initializers, which become part of the bodies.
    """
    found: list[NodeProto] = []
    functions: dict[bytes, FunctionProto] = {}
    readers = _readers([(node, owner) for node, owner, _ in nodes], outputs)
    for (owner, name), group in groupby(nodes, key=lambda one: one[1:]):
        body = [node for node, _, _ in group]
        if not name or len(body) < _FEWEST:
            found += body
            continue
        found.append(_call(body, owner, name, readers, constants, functions, opset))
    return found, list(functions.values())


def _readers(nodes: Sequence[tuple[NodeProto, str]], outputs: Iterable[str]) -> dict[str, set[str]]:
    """Names of the fx nodes that read each value; the model's results are read by ''."""
    readers: dict[str, set[str]] = {name: {""} for name in outputs}
    for node, owner in nodes:
        for name in inputs_of(node):
            readers.setdefault(name, set()).add(owner)
    return readers


def inputs_of(node: NodeProto) -> list[str]:
    """What a node reads, the body of a Scan included."""
    names = [name for name in node.input if name]
    for attribute in node.attribute:
        for inner in attribute.g.node:
            names += inputs_of(inner)
    return names


def _call(
    body: Sequence[NodeProto],
    owner: str,
    name: str,
    readers: dict[str, set[str]],
    constants: dict[str, TensorProto],
    functions: dict[bytes, FunctionProto],
    opset: int,
) -> NodeProto:
    from onnx import NodeProto, TensorProto, helper

    inside = {value for node in body for value in node.output}
    given = dict.fromkeys(
        value
        for node in body
        for value in node.input
        if value and value not in inside and value not in constants
    )
    made = [v for node in body for v in node.output if readers.get(v, set()) - {owner}]
    names = {"": ""}
    names |= {value: f"i{index}" for index, value in enumerate(given)}
    names |= {value: f"o{index}" for index, value in enumerate(made)}
    kept: list[NodeProto] = []
    for node in body:
        for value in (*node.input, *node.output):
            if value not in names:
                names[value] = f"v{len(names)}"
                if value in constants:
                    tensor = TensorProto()
                    tensor.CopyFrom(constants[value])
                    tensor.name = ""
                    kept.append(helper.make_node("Constant", [], [names[value]], value=tensor))
        copy = NodeProto()
        copy.CopyFrom(node)
        copy.name = ""
        for side in (copy.input, copy.output):
            side[:] = [names[value] for value in side]
        kept.append(copy)
    function = helper.make_function(
        DOMAIN,
        name,
        [names[value] for value in given],
        [names[value] for value in made],
        kept,
        [helper.make_opsetid("", opset)],
    )
    stored = functions.setdefault(function.SerializeToString(deterministic=True), function)
    if stored is function:
        same = sum(one.name.split(".")[0] == name for one in functions.values()) - 1
        stored.name = f"{name}.{same}" if same else name
    return helper.make_node(stored.name, list(given), made, name=owner, domain=DOMAIN)


def flat_operators(model: ModelProto) -> list[str]:
    """Every operator of a model's graph by its type, functions in place of their calls.

    Constants in bodies, and the bodies of scans, are not counted.
    """
    bodies = {
        one.name: [node.op_type for node in one.node if node.op_type != "Constant"]
        for one in model.functions
    }
    found: list[str] = []
    for node in model.graph.node:
        found += bodies[node.op_type] if node.domain == DOMAIN else [node.op_type]
    return found
