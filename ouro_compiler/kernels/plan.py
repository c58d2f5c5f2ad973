"""Which kernels a graph runs on a target, found by running it on fake tensors. Needs no GPU."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from ouro_compiler.config import Target
from ouro_compiler.kernels import cpu, cuda
from ouro_compiler.kernels.dispatch import Implementation
from ouro_compiler.kernels.launch import Launch, record_launches

IMPLEMENTATIONS: Mapping[Target, Mapping[str, Implementation]] = {
    "cpu": cpu.IMPLEMENTATIONS,
    "cuda": cuda.IMPLEMENTATIONS,
}
NO_KERNEL = "no kernel is generated for this operator"
_BATCHES = (1, 1024)  # scans have a form for an idle GPU and one for a busy one


@dataclass(frozen=True, kw_only=True)
class KernelPlan:
    """What runs one `ouro` node: its launches, or why its reference does."""

    node: fx.Node
    op: str
    launches: tuple[Launch, ...] = ()
    copies: tuple[str, ...] = ()
    reason: str | None = None

    @property
    def kernel(self) -> str:
        """The last kernel's label (the others prepare it), or "reference"."""
        return self.launches[-1].spec.label if self.launches else "reference"


def plan_kernels(gm: fx.GraphModule, target: Target, batch: int = 1) -> list[KernelPlan]:
    """A plan for every `ouro` node of a graph of one input (B, ...), in graph order.

    Of all kernels only those of scans depend on the batch (`blocks.scan_blocks`).
    """
    placeholder = next(node for node in gm.graph.nodes if node.op == "placeholder")
    like = placeholder.meta["val"]
    mode = FakeTensorMode()
    with mode, torch.no_grad():
        images = torch.empty([batch, *map(int, like.shape[1:])], dtype=like.dtype)
        planner = _Planner(gm, mode, IMPLEMENTATIONS[target])
        planner.run(images, enable_io_processing=False)
    return planner.plans


def plan_launches(gm: fx.GraphModule, target: Target) -> list[Launch]:
    """One launch for every kernel that a graph runs at some batch size."""
    placeholder = next(node for node in gm.graph.nodes if node.op == "placeholder")
    size = placeholder.meta["val"].shape[0]
    first, *others = (size,) if isinstance(size, int) else _BATCHES
    found = distinct_launches(plan_kernels(gm, target, first))
    for batch in others:
        specs = {one.spec for one in found}
        more = distinct_launches(plan_kernels(gm, target, batch))
        found += [one for one in more if one.spec not in specs]
    return found


def distinct_launches(plans: Iterable[KernelPlan]) -> list[Launch]:
    """One launch for every kernel that has to be compiled."""
    found: dict[Any, Launch] = {}
    for plan in plans:
        for one in plan.launches:
            kinds = tuple(arg.dtype if isinstance(arg, Tensor) else arg for arg in one.args)
            found.setdefault((one.spec, kinds), one)
    return list(found.values())


class _Planner(fx.Interpreter):
    def __init__(
        self,
        gm: fx.GraphModule,
        mode: FakeTensorMode,
        implementations: Mapping[str, Implementation],
    ) -> None:
        super().__init__(gm)
        self.mode, self.implementations = mode, implementations
        self.plans: list[KernelPlan] = []

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        found = super().get_attr(target, args, kwargs)
        return self.mode.from_tensor(found) if isinstance(found, Tensor) else found

    def run_node(self, n: fx.Node) -> Any:
        target = n.target
        if isinstance(target, torch._ops.OpOverload) and target.namespace == "ouro":
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            self.plans.append(self._plan(n, target, args, kwargs))
        return super().run_node(n)

    def _plan(
        self, node: fx.Node, target: torch._ops.OpOverload, args: Any, kwargs: Any
    ) -> KernelPlan:
        name = target._schema.name.removeprefix("ouro::")
        found = self.implementations.get(name)
        reason = NO_KERNEL if found is None else found.refuse(*args, **kwargs)
        if found is None or reason is not None:
            return KernelPlan(node=node, op=name, reason=reason)
        with record_launches() as recording:
            found.kernel(*args, **kwargs)
        return KernelPlan(
            node=node, op=name, launches=tuple(recording.launches), copies=tuple(recording.copies)
        )
