"""Dynamo's graph and inputs -> a module of one image tensor, its parameters bound as constants.

A graph that has no such form is no error of the user's: it is told apart by UncalibratableError.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.guards import GuardBuilder
from torch._guards import TracingContext

from ouro_compiler.errors import UsageError
from ouro_compiler.frontend.capture import require_fp32
from ouro_compiler.graph import add_constant, aten, get_constant, replace_node, set_constant

_RESUMED = "torch_dynamo_resume_in_"  # Dynamo's names for what follows a graph break
_KEY = re.compile(r"\._(?:modules|parameters|buffers)\['([^']+)'\]")
_ATTRIBUTE = re.compile(r"\.(\w+)$")
_CPU = torch.device("cpu")


class UncalibratableError(Exception):
    """Why images cannot be run through a graph; `ouro` then returns the graph as it was."""


@dataclass(frozen=True, kw_only=True)
class ImageGraph:
    """A graph of Dynamo's as a module, on the CPU: images -> a tensor, or a tuple of several.

    index: the image's place among Dynamo's inputs. shape: of the image, (B, ...). dynamic: whether
    the graph holds for other B. device: where Dynamo's inputs are.
    """

    module: fx.GraphModule
    index: int
    shape: tuple[int, ...]
    dynamic: bool
    device: torch.device


def bind(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> ImageGraph:
    """Make the module of one image that `gm` is, leaving `gm` alone.

    Parameters, buffers and other tensors of modules become copies under the names they have in the
    model. Numbers that Dynamo would let vary, all but the batch size, are fixed: guards make Dynamo
    compile again for others. Raises UncalibratableError for what takes no image, or several, and
    UsageError for images that are not fp32 or ask for gradients.
    """
    _refuse_what_follows_a_break()
    graph = fx.Graph()
    output = graph.graph_copy(gm.graph, {})
    graph.output(_single(output))
    bound = fx.GraphModule(gm, graph)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    inputs = list(zip(placeholders, example_inputs, strict=True))
    candidates = [index for index, (node, value) in enumerate(inputs) if _is_image(node, value)]
    if len(candidates) != 1:
        raise UncalibratableError(
            f"it takes {len(candidates)} tensors besides its parameters, not one image tensor"
        )
    image, example = inputs[candidates[0]]
    _check_image(example)
    dims = _dims(image)
    shape = (_hint(dims[0], example), *(int(size) for size in dims[1:]))  # int() sets a guard
    dynamic = _number(dims[0]) is None
    for node, value in inputs:
        if node is image:
            continue
        if isinstance(value, Tensor) and not _is_number_in_a_tensor(node):
            _bind_constant(bound, node, value)
        elif isinstance(value, Tensor):
            _fix_number(node)
        else:
            _bind_size(node, image, dims[0] if dynamic else None)
    _copy_attributes(bound)
    _drop_grad_modes(graph)
    _place_on_cpu(graph)
    bound.recompile()
    return ImageGraph(
        module=bound,
        index=candidates[0],
        shape=shape,
        dynamic=dynamic,
        device=example.device,
    )


def _refuse_what_follows_a_break() -> None:
    context = TracingContext.try_get()
    code = context.traced_code[0] if context is not None and context.traced_code else None
    if code is not None and code.co_name.startswith(_RESUMED):
        raise UncalibratableError(
            "it follows a graph break, so its input is no longer the image "
            "(TORCH_LOGS=graph_breaks shows where)"
        )


def _single(output: Any) -> Any:
    """The one tensor, or the tuple of tensors, that a graph returns."""
    values = tuple(output) if isinstance(output, (tuple, list)) else (output,)
    if not values:
        raise UncalibratableError("it returns nothing")
    for value in values:
        if not isinstance(value, fx.Node) or not isinstance(_example(value), Tensor):
            raise UncalibratableError("it returns something else than tensors")
    return values[0] if len(values) == 1 else values


def _example(node: fx.Node) -> Any:
    return node.meta.get("example_value", node.meta.get("val"))


def _source(node: fx.Node) -> Any:
    grapharg = node.meta.get("grapharg")
    return getattr(grapharg, "source", None)


def _value_of(attribute: Any) -> Any:
    """What is a property in one version of torch is a method in another."""
    return attribute() if callable(attribute) else attribute


def _is_number_in_a_tensor(node: fx.Node) -> bool:
    """A Python float that Dynamo passes as a tensor of no dimensions."""
    return bool(getattr(node.meta.get("grapharg"), "pass_arg_as_tensor", False))


def _is_image(node: fx.Node, value: Any) -> bool:
    if not isinstance(value, Tensor) or isinstance(value, torch.nn.Parameter):
        return False
    source = _source(node)
    of_a_module = source is not None and "NN_MODULE" in str(_value_of(source.guard_source))
    return not of_a_module and not _is_number_in_a_tensor(node)


def _check_image(example: Tensor) -> None:
    if not example.is_floating_point() or example.dim() < 2:
        raise UncalibratableError(
            f"its input is no image, but a tensor of {example.dtype} and {example.dim()} dimensions"
        )
    require_fp32(example)
    if example.requires_grad:
        raise UsageError(
            "the images require gradients, which do not flow through a quantized graph"
        )


def _dims(image: fx.Node) -> Sequence[Any]:
    """The sizes of the image as Dynamo sees them: integers, or symbols."""
    return list(_example(image).shape)


def _number(size: Any) -> int | None:
    """What a size is known to be, None if it may vary."""
    if isinstance(size, torch.SymInt):
        return size.node.maybe_as_int()
    return int(size)


def _hint(size: Any, example: Tensor) -> int:
    found = _number(size)
    if found is not None:
        return found
    return int(size.node.hint if isinstance(example.shape[0], torch.SymInt) else example.shape[0])


def _bind_constant(bound: fx.GraphModule, node: fx.Node, value: Tensor) -> None:
    """A copy of the tensor in place of its placeholder, and a guard on which tensor it is.

    Without the guard, Dynamo would run one model's graph, weights included, for another of the same
    architecture: its own guards ask for the same shapes alone. It drops the graph when a tensor so
    guarded is freed, so a new one at the old address is no danger.
    """
    source = _source(node)
    if source is not None:
        guards = TracingContext.get().guards_context.dynamo_guards
        guards.add(source.make_guard(GuardBuilder.ID_MATCH))
    copy = value.detach().to(_CPU, copy=True)
    with bound.graph.inserting_before(node):
        constant = add_constant(bound, _model_name(source) or node.name, copy)
    replace_node(node, constant)


def _copy_attributes(bound: fx.GraphModule) -> None:
    """Own copies, on the CPU, of the tensors that Dynamo keeps in the graph's module."""
    own = {id(tensor) for tensor in bound.buffers()}
    for node in bound.graph.nodes:
        value = get_constant(bound, node)
        if value is not None and id(value) not in own:
            set_constant(bound, str(node.target), value.detach().to(_CPU, copy=True))


def _model_name(source: Any) -> str | None:
    """`layers.0.weight` for L['self']._modules['layers']._modules['0']._parameters['weight']."""
    if source is None:
        return None
    name = str(_value_of(source.name))
    found = list(_KEY.finditer(name))
    rest = name[found[-1].end() :] if found else name
    attribute = _ATTRIBUTE.fullmatch(rest) if found else _ATTRIBUTE.search(rest)
    if rest and attribute is None:
        return None
    return ".".join([key[1] for key in found] + ([attribute[1]] if attribute else []))


def _fix_number(node: fx.Node) -> None:
    """A float at the value that it has now: float() of a symbol sets a guard."""
    for user in list(node.users):
        value = _example(user)
        if not isinstance(value, (torch.SymFloat, float)):
            raise UncalibratableError(f"the number {node.name} is used as a tensor")
        user.replace_all_uses_with(float(value))  # type: ignore[arg-type]
        user.graph.erase_node(user)
    node.graph.erase_node(node)


def _bind_size(node: fx.Node, image: fx.Node, batch: Any) -> None:
    """The batch size is read off the image; another integer is fixed."""
    value = _example(node)
    if batch is not None and isinstance(value, torch.SymInt) and value.node.expr == batch.node.expr:
        with node.graph.inserting_after(image):
            size = node.graph.call_function(aten.sym_size.int, (image, 0))
        node.replace_all_uses_with(size)
    else:
        node.replace_all_uses_with(int(value))  # type: ignore[arg-type]
    node.graph.erase_node(node)


def _drop_grad_modes(graph: fx.Graph) -> None:
    """Nothing here is differentiated: what switches gradients on and off is dropped."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is torch._C._set_grad_enabled:
            graph.erase_node(node)


def _place_on_cpu(graph: fx.Graph) -> None:
    """Compilation runs on the CPU: tensors that the graph makes must be there too."""

    def moved(value: Any) -> Any:
        return _CPU if isinstance(value, torch.device) else value

    for node in graph.nodes:
        node.args = fx.node.map_aggregate(node.args, moved)
        node.kwargs = fx.node.map_aggregate(node.kwargs, moved)


def refuse_training(gm: fx.GraphModule) -> None:
    """Raise UsageError for a captured graph in training mode, or one that draws random numbers."""
    for node in gm.graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        arguments = node.target._schema.arguments
        defaults = {arg.name: arg.default_value for arg in arguments if arg.has_default_value()}
        given = dict(zip([arg.name for arg in arguments], node.args, strict=False))
        values = {**defaults, **given, **node.kwargs}
        dropped = values.get("p", values.get("dropout_p"))  # attention has it without dropout too
        flags = [values[name] for name in ("train", "training") if name in values]
        random = torch.Tag.nondeterministic_seeded in node.target.tags
        if dropped == 0 or not (any(flags) or (random and not flags)):
            continue
        raise UsageError(
            f"the model is in training mode, or draws random numbers ({node.target}): "
            "call model.eval()"
        )
