"""Other spellings of a linear layer, each rewritten as `aten.linear` with views around it.

`as_linear` serves normalize_linear, which moves the views out of the way afterwards.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

from torch import Tensor, fx

from ouro_compiler.graph import all_arguments, aten, value_of
from ouro_compiler.passes.editing import call, new_constant
from ouro_compiler.passes.views import Size, evaluate_constant, same_size

Constant = tuple[fx.Node, Tensor]  # the parameter it comes from, its value


def as_linear(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """A node equal to `node`, computed by linears just before it; None if it is no linear layer."""
    rule = _RULES.get(node.target) if node.op == "call_function" else None
    return None if rule is None else rule(gm, node)


def _linear(
    gm: fx.GraphModule, before: fx.Node, x: fx.Node, weight: Constant, bias: fx.Node | None
) -> fx.Node:
    parameter = _parameter(gm, before, weight, "2d")
    return call(before, aten.linear.default, x, parameter, *(() if bias is None else (bias,)))


def _parameter(gm: fx.GraphModule, before: fx.Node, constant: Constant, suffix: str) -> fx.Node:
    """A get_attr node for a value: the parameter itself where that is what it is."""
    base, value = constant
    own = evaluate_constant(gm, base)
    assert own is not None
    whole = own[1]
    same_memory = value.data_ptr() == whole.data_ptr() and value.stride() == whole.stride()
    if same_memory and value.shape == whole.shape:
        return base
    return new_constant(gm, before, f"{base.target}_{suffix}", value)


def _is_parameter(gm: fx.GraphModule, node: object) -> bool:
    return evaluate_constant(gm, node) is not None


def _constant_of_rank(gm: fx.GraphModule, node: object, rank: int) -> Constant | None:
    found = evaluate_constant(gm, node)
    return found if found is not None and found[1].dim() == rank else None


# --- products of matrices


def _from_matmul(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    left, right = node.args[:2]
    assert isinstance(left, fx.Node)
    assert isinstance(right, fx.Node)
    if _is_parameter(gm, left) and _is_parameter(gm, right):
        return None
    weight = _constant_of_rank(gm, right, 2)
    if weight is not None and value_of(left).dim() >= 2:
        return _linear(gm, node, left, (weight[0], weight[1].t()), None)
    weight = _constant_of_rank(gm, left, 2)
    if weight is not None and value_of(right).dim() >= 2:
        turned = call(node, aten.transpose.int, right, -2, -1)
        return call(node, aten.transpose.int, _linear(gm, node, turned, weight, None), -2, -1)
    return None


def _from_addmm(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    bias, x, right = node.args[:3]
    scaled = [value for value in (*node.args[3:], *node.kwargs.values()) if value != 1]
    weight, shift = _constant_of_rank(gm, right, 2), _constant_of_rank(gm, bias, 1)
    if weight is None or shift is None or scaled or _is_parameter(gm, x):
        return None
    if shift[1].shape[0] != weight[1].shape[1]:
        return None
    assert isinstance(x, fx.Node)
    added = _parameter(gm, node, shift, "1d")
    return _linear(gm, node, x, (weight[0], weight[1].t()), added)


# --- convolutions over one position


def _pointwise(gm: fx.GraphModule, node: fx.Node, spatial: int) -> tuple[Constant, int] | None:
    """(weight with spatial dimensions dropped, groups) of a convolution of kernel size 1."""
    x, weight, _, stride, padding, _, groups = all_arguments(node)
    kernel = _constant_of_rank(gm, weight, spatial + 2)
    if kernel is None or value_of(x).dim() != spatial + 2:
        return None
    if any(one != 1 for one in (*kernel[1].shape[2:], *stride)):
        return None
    if any(padding) if not isinstance(padding, str) else padding not in ("valid", "same"):
        return None
    return (kernel[0], kernel[1].flatten(1)), groups


def _bias(gm: fx.GraphModule, node: fx.Node) -> tuple[bool, Constant | None]:
    """(may the bias be used, its value)."""
    bias = all_arguments(node)[2]
    found = evaluate_constant(gm, bias)
    return bias is None or found is not None, found


def _from_conv2d(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    found = _pointwise(gm, node, 2)
    usable, bias = _bias(gm, node)
    if found is None or found[1] != 1 or not usable:
        return None
    x = all_arguments(node)[0]
    batch, channels, height, width = value_of(x).shape
    if not isinstance(height, int) or not isinstance(width, int):
        return None
    rows = _known(batch)
    x = call(node, aten.permute.default, x, [0, 2, 3, 1])
    x = call(node, aten.reshape.default, x, [rows, height * width, channels])
    added = None if bias is None else _parameter(gm, node, bias, "1d")
    y = _linear(gm, node, x, found[0], added)
    y = call(node, aten.reshape.default, y, [rows, height, width, found[0][1].shape[0]])
    return call(node, aten.permute.default, y, [0, 3, 1, 2])


def _known(size: Size) -> int:
    return size if isinstance(size, int) else -1


def _from_conv1d(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    found = _pointwise(gm, node, 1)
    usable, bias = _bias(gm, node)
    if found is None or not usable:
        return None
    (base, weight), groups = found
    if 1 < groups == weight.shape[0] and weight.shape[1] == 1:  # depthwise: a scale a channel
        return None
    x = call(node, aten.transpose.int, all_arguments(node)[0], 1, 2)
    if groups == 1:
        added = None if bias is None else _parameter(gm, node, bias, "1d")
        y = _linear(gm, node, x, (base, weight), added)
    else:
        shifts = None if bias is None else [(bias[0], one) for one in bias[1].chunk(groups)]
        weights = [(base, one) for one in weight.chunk(groups)]
        y = _grouped(gm, node, x, weights, shifts)
    return call(node, aten.transpose.int, y, 1, 2)


def _grouped(
    gm: fx.GraphModule,
    before: fx.Node,
    x: fx.Node,
    weights: Sequence[Constant],
    shifts: Sequence[Constant] | None,
) -> fx.Node:
    """One linear for every group of x's last dimension, concatenated."""
    parts = call(before, aten.chunk.default, x, len(weights), -1)
    results: list[fx.Node] = []
    for index, weight in enumerate(weights):
        part = call(before, operator.getitem, parts, index)
        kernel = _parameter(gm, before, weight, str(index))
        shift = () if shifts is None else (_parameter(gm, before, shifts[index], str(index)),)
        results.append(call(before, aten.linear.default, part, kernel, *shift))
    return call(before, aten.cat.default, results, -1)


# --- einsum


def _from_einsum(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    equation, operands = node.args[:2]
    inputs, _, result = str(equation).replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not isinstance(operands, (list, tuple)) or len(operands) != 2 or len(terms) != 2:
        return None
    if "." in inputs or not result or any(len(set(t)) != len(t) for t in (*terms, result)):
        return None
    weight = evaluate_constant(gm, operands[1])
    x, labels, weight_labels = operands[0], terms[0], terms[1]
    if weight is None:
        weight = evaluate_constant(gm, operands[0])
        x, labels, weight_labels = operands[1], terms[1], terms[0]
    if weight is None or _is_parameter(gm, x):
        return None
    assert isinstance(x, fx.Node)
    return _contraction(gm, node, x, weight, labels, weight_labels, result)


def _contraction(
    gm: fx.GraphModule,
    node: fx.Node,
    x: fx.Node,
    weight: Constant,
    labels: str,
    weight_labels: str,
    result: str,
) -> fx.Node | None:
    """`x[..k..d..] , weight[k c d] -> [..k..c..]` with k optional, in any order of letters."""
    shared = [one for one in weight_labels if one in labels]
    contracted = [one for one in shared if one not in result]
    group = [one for one in shared if one in result]
    outputs = [one for one in weight_labels if one not in labels]
    rest = [one for one in labels if one not in shared]
    if len(contracted) != 1 or len(outputs) != 1 or len(group) > 1 or not rest:
        return None
    if set(result) != {*rest, *group, *outputs}:
        return None
    base, value = weight
    sizes = dict(zip(weight_labels, value.shape, strict=True))
    shape = dict(zip(labels, value_of(x).shape, strict=True))
    if any(not same_size(sizes[one], shape[one]) for one in shared):  # a broadcast of size 1
        return None
    value = value.permute([weight_labels.index(one) for one in (*group, *outputs, *contracted)])
    kept = [one for one in labels if one not in group]
    order = [kept.index(one) for one in (*rest, *contracted)]
    if not group:
        turned = call(node, aten.permute.default, x, order)
        y = _linear(gm, node, turned, (base, value), None)
        written = [*rest, *outputs]
    else:
        parts: list[fx.Node] = []
        for index in range(value.shape[0]):
            part = call(node, aten.select.int, x, labels.index(group[0]), index)
            part = call(node, aten.permute.default, part, order)
            kernel = _parameter(gm, node, (base, value[index]), str(index))
            parts.append(call(node, aten.linear.default, part, kernel))
        y = call(node, aten.stack.default, parts, 0)
        written = [*group, *rest, *outputs]
    return call(node, aten.permute.default, y, [written.index(one) for one in result])


_RULES: dict[object, Callable[[fx.GraphModule, fx.Node], fx.Node | None]] = {
    aten.matmul.default: _from_matmul,
    aten.mm.default: _from_matmul,
    aten.addmm.default: _from_addmm,
    aten.conv2d.default: _from_conv2d,
    aten.conv2d.padding: _from_conv2d,
    aten.conv1d.default: _from_conv1d,
    aten.conv1d.padding: _from_conv1d,
    aten.einsum.default: _from_einsum,
}
