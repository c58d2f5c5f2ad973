"""Emitter: collects ONNX nodes and initializers while a graph is translated node by node.

A translation is a function `(Emitter, fx.Node) -> str | tuple of str` registered with `translates`
for op overloads: it returns the names of the node's ONNX values. Constants and sizes are emitted
when first asked for, so that what nobody reads (packed weights, checks of sizes) is not there.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, fx

from ouro_compiler.errors import ModelError
from ouro_compiler.graph import argument, aten, get_constant, is_op, value_of

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto, TensorProto

ScanForm = Literal["scan", "contrib"]
Translated = str | tuple[str | None, ...]
Translation = Callable[["Emitter", fx.Node], Translated]
TRANSLATIONS: dict[Any, Translation] = {}
CONTRIB = "com.microsoft"
_SIZES = {operator.add: "Add", operator.sub: "Sub", operator.mul: "Mul", operator.floordiv: "Div"}


def translates(*targets: Any) -> Callable[[Translation], Translation]:
    """Register the translation of these op overloads."""

    def register(function: Translation) -> Translation:
        for target in targets:
            assert target not in TRANSLATIONS, target
            TRANSLATIONS[target] = function
        return function

    return register


class Emitter:
    """What is emitted so far. Values are named after the fx node that they are made for."""

    def __init__(self, gm: fx.GraphModule, opset: int, scan: ScanForm) -> None:
        self.gm, self.opset, self.scan = gm, opset, scan
        self.nodes: list[NodeProto] = []
        self.owners: list[str] = []  # of each node: what it was emitted for
        self.initializers: dict[str, TensorProto] = {}
        self.unnamed: dict[str, TensorProto] = {}  # initializers that are no parameter's
        self.values: dict[fx.Node, Translated] = {}
        self.prefix = "graph"  # the name of the fx node that is being translated
        self.empty_lists: set[str] = set()  # outlier lists that never hold a channel
        self._counts: dict[str, int] = {}
        self._shared: dict[tuple[Any, ...], str] = {}  # nodes and constants, by what they compute

    # --- nodes

    def op(self, kind: str, *inputs: str | None, domain: str = "", **attributes: Any) -> str:
        """Emit a node with one output, whose name is returned. None is an absent input."""
        return self.multi(kind, inputs, 1, domain=domain, **attributes)[0]

    def multi(
        self,
        kind: str,
        inputs: Sequence[str | None],
        outputs: int,
        domain: str = "",
        **attributes: Any,
    ) -> list[str]:
        """Emit a node with several outputs."""
        from onnx import helper

        base = self.fresh(kind)
        names = [base] if outputs == 1 else [f"{base}.{index}" for index in range(outputs)]
        given = [name or "" for name in inputs]
        while given and not given[-1]:  # absent at the end is left out: "" there crashes some ops
            given.pop()
        self.add(helper.make_node(kind, given, names, name=base, domain=domain, **attributes))
        return names

    def add(self, node: NodeProto) -> None:
        """Append a node, as one of the fx node that is being translated."""
        self.nodes.append(node)
        self.owners.append(self.prefix)

    def fresh(self, kind: str) -> str:
        """A name that nothing has yet."""
        base = f"{self.prefix}/{kind}"
        number = self._counts.get(base, 0)
        self._counts[base] = number + 1
        return f"{base}_{number}" if number else base

    # --- constants

    def constant(self, value: Tensor, name: str | None = None) -> str:
        """An initializer. Unnamed ones with equal content are shared."""
        from onnx import numpy_helper

        array = value.detach().cpu().contiguous().numpy()
        if name is None:
            key = ("constant", str(array.dtype), array.shape, array.tobytes())
            if key not in self._shared:
                self._shared[key] = f"constant_{sum(k[0] == 'constant' for k in self._shared)}"
            name = self._shared[key]
            self.unnamed[name] = numpy_helper.from_array(array, name)
        if name not in self.initializers:
            self.initializers[name] = numpy_helper.from_array(array, name)
        return name

    def four_bit_constant(self, codes: Tensor, name: str) -> str:
        """An INT4 initializer of int8 codes in -8 .. 7, two a byte."""
        from onnx import TensorProto, helper

        if name not in self.initializers:
            flat = torch.nn.functional.pad(codes.flatten(), (0, codes.numel() % 2))
            pairs = flat.view(torch.uint8).view(-1, 2)
            packed = (pairs[:, 0] & 0xF) | (pairs[:, 1] << 4)
            shape = list(codes.shape)
            self.initializers[name] = helper.make_tensor(
                name, TensorProto.INT4, shape, packed.numpy().tobytes(), raw=True
            )
        return name

    def integers(self, *values: int) -> str:
        """An int64 vector."""
        return self.constant(torch.tensor(values, dtype=torch.int64))

    def number(self, value: float, dtype: torch.dtype = torch.float32) -> str:
        """A scalar."""
        return self.constant(torch.tensor(value, dtype=dtype))

    # --- values of fx nodes

    def get(self, arg: Any) -> str:
        """The ONNX value of a tensor argument, as it is."""
        if not isinstance(arg, fx.Node):
            raise ModelError(f"ONNX export expected a tensor, found {arg!r} in {self.prefix}")
        found = self.values.get(arg)
        if found is None:
            value = get_constant(self.gm, arg)
            assert value is not None, f"{arg} was not translated"
            found = self.values[arg] = self.constant(value, str(arg.target))
        assert isinstance(found, str), f"{arg} has several values"
        return found

    def real(self, arg: Any) -> str:
        """A tensor argument as fp32: fp16 constants are stored as they are and cast."""
        name = self.get(arg)
        return name if value_of(arg).dtype == torch.float32 else self.cast(name, torch.float32)

    def column(self, arg: Any) -> str:
        """A vector argument (n,) as fp32 (n, 1); constants are stored in that shape."""
        value = get_constant(self.gm, arg)
        if value is None:
            return self.op("Unsqueeze", self.real(arg), self.integers(-1))
        name = self.constant(value[:, None], f"{arg.target}.column")
        return name if value.dtype == torch.float32 else self.cast(name, torch.float32)

    def cast(self, name: str, dtype: torch.dtype) -> str:
        """A value in another dtype; equal casts of one fx node are shared."""
        from onnx.helper import np_dtype_to_tensor_dtype

        key = ("cast", self.prefix, name, dtype)
        if key not in self._shared:
            to = np_dtype_to_tensor_dtype(torch.empty(0, dtype=dtype).numpy().dtype)
            self._shared[key] = self.op("Cast", name, to=to)
        return self._shared[key]

    def known(self, arg: Any) -> Tensor | None:
        """The tensor behind an argument that is a constant, else None."""
        return get_constant(self.gm, arg)

    # --- sizes

    def size(self, arg: Any) -> int | str:
        """A size argument: a number, or the name of an int64 vector of one element."""
        if not isinstance(arg, fx.Node):
            return int(arg)
        fixed = static(value_of(arg))
        if fixed is not None:
            return fixed
        if arg not in self.values:
            self.values[arg] = self._emit_size(arg)
        found = self.values[arg]
        assert isinstance(found, str)
        return found

    def _emit_size(self, node: fx.Node) -> str:
        if is_op(node, aten.sym_size.int):
            axis = argument(node, "dim")
            return self.op("Shape", self.get(node.args[0]), start=axis, end=axis + 1 or None)
        if node.target in _SIZES:
            left, right = (self.size_vector([arg]) for arg in node.args)
            return self.op(_SIZES[node.target], left, right)
        raise ModelError(f"ONNX export has no translation for {node.target} of sizes")

    def size_vector(self, sizes: Sequence[Any]) -> str:
        """Sizes, static or not, as one int64 vector."""
        parts = [self.size(one) for one in sizes]
        if all(isinstance(one, int) for one in parts):
            return self.integers(*parts)  # type: ignore[arg-type]
        named = [self.integers(one) if isinstance(one, int) else one for one in parts]
        return named[0] if len(named) == 1 else self.op("Concat", *named, axis=0)

    def reshape(
        self, name: str, before: Sequence[Any], shape: Sequence[Any], sizes: Sequence[Any] = ()
    ) -> str:
        """View a value of shape `before` as a fake tensor's shape, with one symbolic size.

        A batch that stays the first dimension is copied (0): runtimes then know it as the same, and
        ONNX Runtime opens graphs of thousands of nodes much faster. sizes: the arguments that the
        sizes came from, for the case that several are symbolic.
        """
        fixed = [static(one) for one in shape]
        if fixed.count(None) <= 1:
            target = [-1 if one is None else one for one in fixed]
            if target and target[0] == -1 and len(before) and str(before[0]) == str(shape[0]):
                target[0] = 0
            return self.op("Reshape", name, self.integers(*target))
        if len(sizes) == len(shape):
            return self.op("Reshape", name, self.size_vector(sizes))
        raise ModelError(f"{self.prefix}: ONNX export views one dynamic size, not several")

    # --- sub-graphs

    def body(
        self, nodes: list[NodeProto], inputs: Sequence[Any], outputs: Sequence[Any]
    ) -> GraphProto:
        """The body of a Scan; inputs and outputs are (name, shape) of fp32 values."""
        from onnx import TensorProto, helper

        given, made = (
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in side]
            for side in (inputs, outputs)
        )
        return helper.make_graph(nodes, self.fresh("body"), given, made)


def static(size: Any) -> int | None:
    """A size as a number, None where it depends on the batch."""
    if isinstance(size, torch.SymInt):
        return size.node.maybe_as_int()
    return int(size)
