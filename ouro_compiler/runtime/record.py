"""What a graph would call at one batch size, found by running it on fake tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from ouro_compiler.kernels.dispatch import Implementation
from ouro_compiler.kernels.launch import Launch, Recording, record_launches


@dataclass
class Call:
    """A node without a kernel: a function, what it takes, and the tensors it makes."""

    function: Callable[..., Any]
    args: Any
    results: list[Tensor]


Step = Launch | Call


@dataclass
class Record:
    """Steps with the fake tensors they name; storages go by number.

    constants: the real tensors behind some storages. images and outputs: of the whole graph.
    """

    steps: list[Step] = field(default_factory=list)
    names: list[str] = field(default_factory=list)  # of the node behind each step
    constants: dict[int, Tensor] = field(default_factory=dict)
    kept: list[Tensor] = field(default_factory=list)  # so that no storage's number is used again
    images: Tensor = field(default_factory=lambda: torch.empty(0))
    outputs: Any = None


def record_graph(
    gm: fx.GraphModule,
    images: Tensor,
    implementations: Mapping[str, Implementation],
    usable: Callable[[Recording], bool] = lambda recording: True,
) -> Record:
    """The steps of a graph of one input at the batch size of `images`; nothing is computed.

    usable: whether what an operator would launch can be launched; it is called as it is where not,
    and where its kernel would copy operands first. Views are no steps.
    """
    record = Record()
    mode = FakeTensorMode()
    with mode, torch.no_grad():
        recorder = _Recorder(gm, mode, record, implementations, usable)
        record.images = mode.from_tensor(images)
        record.kept.append(record.images)
        record.outputs = recorder.run(record.images)
    return record


def storage_number(tensor: Tensor) -> int:
    """What tells a tensor's storage from all others that are alive."""
    return int(tensor.untyped_storage()._cdata)


def tensors_of(step: Step) -> list[Tensor]:
    """All tensors that a step names."""
    if isinstance(step, Launch):
        return [one for one in step.args if isinstance(one, Tensor)]
    return [x for x in pytree.tree_leaves((step.args, step.results)) if isinstance(x, Tensor)]


class _Recorder(fx.Interpreter):
    """Runs a graph on fake tensors, noting what would be called."""

    def __init__(
        self,
        gm: fx.GraphModule,
        mode: FakeTensorMode,
        record: Record,
        implementations: Mapping[str, Implementation],
        usable: Callable[[Recording], bool],
    ) -> None:
        super().__init__(gm)
        self.mode, self.record = mode, record
        self.implementations, self.usable = implementations, usable
        self.name = ""

    def run_node(self, n: fx.Node) -> Any:
        self.name = n.name
        return super().run_node(n)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        found = super().get_attr(target, args, kwargs)
        if not isinstance(found, Tensor):
            return found
        fake = self.mode.from_tensor(found)
        self.record.constants[storage_number(fake)] = found
        self.record.kept.append(fake)
        return fake

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if isinstance(target, torch._ops.OpOverload) and target.namespace == "ouro":
            found = self._launched(target, args, kwargs)
            if found is not None:
                return found
        outputs = super().call_function(target, args, kwargs)
        leaves = pytree.tree_leaves((args, kwargs))
        inputs = {storage_number(x) for x in leaves if isinstance(x, Tensor)}
        made = [x for x in pytree.tree_leaves(outputs) if isinstance(x, Tensor)]
        if all(storage_number(one) in inputs for one in made):
            return outputs  # views, and what is no tensor
        self._note(Call(target, (args, kwargs), made))
        return outputs

    def _launched(self, target: torch._ops.OpOverload, args: Any, kwargs: Any) -> Any:
        """The outputs of an op whose kernels were noted; None if it has to be called as it is."""
        found = self.implementations.get(target._schema.name.removeprefix("ouro::"))
        if found is None or found.refuse(*args, **kwargs) is not None:
            return None
        with record_launches() as recording:
            outputs = found.kernel(*args, **kwargs)
        if recording.copies or not self.usable(recording):
            return None
        for launch in recording.launches:
            self._note(launch)
        return outputs

    def _note(self, step: Step) -> None:
        self.record.kept += tensors_of(step)
        self.record.steps.append(step)
        self.record.names.append(self.name)
