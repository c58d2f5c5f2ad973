"""fx helpers that passes, calibration, lowering and inspection share; the graph's invariants."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher

aten = torch.ops.aten
# operator.* on sizes: what export leaves of shape arithmetic with a dynamic batch.
_SIZE_ARITHMETIC = frozenset(
    getattr(operator, name)
    for name in ["add", "sub", "mul", "floordiv", "mod", "neg", "eq", "ge", "gt", "le", "lt", "ne"]
)
_OPS = frozenset({"placeholder", "get_attr", "call_function", "output"})


HEAD_BITS = "ouro_head_bits"  # in the meta of a linear whose weight alone is to be quantized
OUTPUT = -1  # the index of a site that is a node's own result
# Of sites that arise inside a scan: exp(step A), step B and the state (ops/quantized_scan.py); and
# around them Delta after softplus, C h before D u is added, and silu(z).
DECAY, INPUT, STATE = (-2, -3, -4)
STEP, READOUT, GATE = (-5, -6, -7)
RECURRENCE = (DECAY, INPUT, STATE, STEP, READOUT, GATE)


@dataclass(frozen=True, kw_only=True)
class Site:
    """A tensor to quantize: argument `index` of `node`, fed with (B, L, K) after `transpose`.

    With index OUTPUT it is what the node returns, with one of RECURRENCE what a scan computes at
    every step.
    """

    name: str
    node: fx.Node
    index: int
    bits: int
    kind: str  # "linear", "conv", "ssm", or "activation" of no layer with weights
    layer: str
    transpose: bool = False  # the argument is (B, K, L): quantized along time all the same
    reverse: bool = False
    asymmetric: bool = False
    split: bool = True  # may have outliers
    kappa: float = 3.0

    @property
    def source(self) -> fx.Node:
        """The node whose value is quantized."""
        if self.index < 0:
            return self.node
        args = self.node.args
        found = args[self.index] if self.index < len(args) else all_arguments(self.node)[self.index]
        assert isinstance(found, fx.Node)
        return found


@dataclass(frozen=True, kw_only=True)
class QParams:
    """Calibrated parameters of one site; vectors are (L,), indexed by token, fp32.

    zero_point is None for symmetric sites; channels (int64) is the fixed list of `static` outliers,
    else None. threshold is infinite where nothing may be an outlier. smooth (K,): what channels are
    divided by first, None for nothing.
    """

    scale: Tensor
    threshold: Tensor
    zero_point: Tensor | None = None
    channels: Tensor | None = None
    smooth: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class UniformParams:
    """A plain uniform quantizer, simulated by `ouro::fake_quantize`.

    scale, and zero_point where it is asymmetric, broadcast against (B, L, K): (1,), (L, 1) or (K,).
    smooth (K,): what channels are divided by first. rotation (K, K): what tokens are multiplied by
    next, as by a linear's weight; an equal one is stored once for all sites that share the tensor.
    At STEP, READOUT and GATE scale, zero_point and smooth broadcast against (B, K, L), and the
    result is multiplied by smooth again.
    """

    scale: Tensor
    zero_point: Tensor | None = None
    smooth: Tensor | None = None
    rotation: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class StepParams:
    """An operand inside a scan's recurrence, as `ouro::quantized_selective_scan` takes it.

    scale, threshold (None: no outliers): (L,), indexed by token. steps: codes an octave of a
    logarithmic decay, whose scale (1,) is what code 0 stands for. Of a state: factor (D, N), what
    it is divided by first; before_rounding, does y read it as it was before?
    """

    scale: Tensor
    threshold: Tensor | None = None
    steps: int = 0
    factor: Tensor | None = None
    before_rounding: bool = False


@dataclass(frozen=True, kw_only=True)
class QWeight:
    """A weight's int8 codes (O, K), scales (O,) and, where asymmetric, zero points (O,).

    bias (O,): what replaces the layer's bias, None to keep it.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None = None
    bias: Tensor | None = None


CalibrationTable = Mapping[str, QParams]
SiteParams = QParams | UniformParams | StepParams
SiteTable = Mapping[str, SiteParams]


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What calibration found: parameters by site's name, and weights by their layer's.

    A linear's weight that is not there is quantized by clipping search (METHODS P5). Those of a
    scan are called `layer.A` (of log(-A), (D, N)) and `layer.D` (1, D).
    """

    sites: SiteTable = field(default_factory=dict)
    weights: Mapping[str, QWeight] = field(default_factory=dict)


def is_op(node: Any, *targets: Any) -> bool:
    """Is this a call of one of these op overloads?"""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def value_of(node: fx.Node) -> Any:
    """The fake value of a node."""
    return node.meta["val"]


@contextmanager
def evaluating_fakes(mode: Any) -> Iterator[None]:
    """Ops on fake tensors, with sizes left symbolic.

    Without Python's dispatcher some kernels (`constant_pad_nd`) fix the sizes that they read.
    """
    with mode, torch.no_grad(), enable_python_dispatcher():
        yield


def argument(node: fx.Node, name: str) -> Any:
    """An argument of an op call by its schema name, positional or keyword, or its default."""
    schema = node.target._schema  # type: ignore[union-attr]
    for index, arg in enumerate(schema.arguments):
        if arg.name == name:
            if index < len(node.args) and not arg.kwarg_only:
                return node.args[index]
            return node.kwargs.get(name, arg.default_value)
    raise KeyError(f"{node.target} has no argument {name}")


def all_arguments(node: fx.Node) -> list[Any]:
    """Every positional argument of an op call, defaults filled in."""
    schema = node.target._schema  # type: ignore[union-attr]
    return [argument(node, arg.name) for arg in schema.arguments if not arg.kwarg_only]


def get_constant(gm: fx.GraphModule, node: Any) -> Tensor | None:
    """The tensor behind a get_attr node, None for any other node."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    found: Any = gm
    for part in str(node.target).split("."):
        found = getattr(found, part)
    return found if isinstance(found, Tensor) else None


def set_constant(gm: fx.GraphModule, name: str, value: Tensor) -> str:
    """Register a buffer under a dotted name, replacing what is there; returns the name."""
    *path, leaf = name.split(".")
    owner: Any = gm
    for part in path:
        if not hasattr(owner, part):
            owner.add_module(part, torch.nn.Module())
        owner = getattr(owner, part)
    if hasattr(owner, leaf):
        delattr(owner, leaf)
    owner.register_buffer(leaf, value.detach().contiguous())
    return name


def add_constant(gm: fx.GraphModule, name: str, value: Tensor) -> fx.Node:
    """A get_attr node, at the graph's insertion point, for a new buffer.

    A taken name gets a number appended, so that two users of one weight keep their own.
    """
    free, number = name, 0
    while _has_attribute(gm, free):
        number += 1
        free = f"{name}_{number}"
    node = gm.graph.get_attr(set_constant(gm, free, value))
    return node


def _has_attribute(gm: fx.GraphModule, name: str) -> bool:
    owner: Any = gm
    for part in name.split("."):
        if not hasattr(owner, part):
            return False
        owner = getattr(owner, part)
    return True


def constant_names(gm: fx.GraphModule) -> set[str]:
    """Names of the parameters and buffers that the graph reads."""
    return {str(node.target) for node in gm.graph.nodes if node.op == "get_attr"}


def delete_unused_constants(gm: fx.GraphModule) -> None:
    """Drop parameters and buffers no node reads, and modules left empty."""
    used = constant_names(gm)
    held = [name for name, _ in (*gm.named_parameters(), *gm.named_buffers())]
    for name in held:
        if name not in used:
            path, _, leaf = name.rpartition(".")
            delattr(gm.get_submodule(path), leaf)
    gm.delete_all_unused_submodules()


def replace_node(old: fx.Node, new: fx.Node) -> None:
    """Let `new` take every use of `old`, which is erased."""
    old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    old.graph.erase_node(old)


def insert_call(
    graph: fx.Graph, before: fx.Node, target: Callable[..., Any], *args: Any, **kwargs: Any
) -> fx.Node:
    """A call placed before a node."""
    with graph.inserting_before(before):
        return graph.call_function(target, args, kwargs)


def match_chain(node: Any, *targets: Any) -> list[fx.Node] | None:
    """Follow first arguments from `node` up through these targets, each used once below the first.

    Returns the matched nodes, last op first, or None. A target may be a tuple of alternatives.
    """
    found: list[fx.Node] = []
    for target in targets:
        alternatives = target if isinstance(target, tuple) else (target,)
        if not is_op(node, *alternatives) or (found and len(node.users) != 1):
            return None
        found.append(node)
        node = node.args[0]
    return found


def walk_back(node: Any, through: Iterable[Any]) -> fx.Node | None:
    """The first node up the chain of first arguments that is no call of one of `through`."""
    targets = frozenset(through)
    while is_op(node, *targets):
        node = node.args[0]
    return node if isinstance(node, fx.Node) else None


def verify_graph(gm: fx.GraphModule) -> None:
    """Raise ValueError where the graph breaks an invariant (docs/architecture.md)."""
    for node in gm.graph.nodes:
        if node.op not in _OPS:
            raise ValueError(f"{node.format_node()}: {node.op} nodes are not allowed")
        if node.op == "output":
            continue
        if "val" not in node.meta:
            raise ValueError(f"{node.name} has no meta['val']")
        if node.op != "call_function":
            continue
        target = node.target
        if isinstance(target, torch._ops.OpOverload):
            if target.namespace not in ("aten", "ouro"):
                raise ValueError(f"{node.name}: {target} is neither aten nor ouro")
        elif target is not operator.getitem and target not in _SIZE_ARITHMETIC:
            raise ValueError(f"{node.name}: {target} is no op of aten or ouro")
