"""Running a graph on images and handing layers' operands and results to whoever watches them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ouro_compiler.calibration.calibrate import Progress
from ouro_compiler.calibration.images import Images
from ouro_compiler.errors import UsageError
from ouro_compiler.graph import all_arguments

# Gets the values of every positional argument of a node, defaults filled in, and its result.
Watch = Callable[[list[Any], Any], None]


def watch(
    gm: fx.GraphModule,
    watches: Mapping[fx.Node, Watch],
    batches: Iterable[Tensor],
    stage: str,
    total: int,
    progress: Progress | None = None,
) -> None:
    """Run batches (B, C, H, W) through a graph, calling the watched nodes' functions in its order.

    Raises UsageError where a watched result is not finite, or if there is no batch.
    """
    interpreter = _Watcher(gm, watches)
    done = 0
    for batch in batches:
        with torch.no_grad():
            interpreter.run(batch)
        done += batch.shape[0]
        if progress is not None:
            progress(stage, done, total)
    if done == 0:
        raise UsageError("calibration needs at least one image")


def first_images(images: Images, count: int) -> Tensor:
    """The first images (n, C, H, W), n <= count. Raises UsageError if there is none."""
    for batch in images.batches(count):
        return batch
    raise UsageError("calibration needs at least one image")


class _Watcher(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, watches: Mapping[fx.Node, Watch]) -> None:
        super().__init__(gm)
        self.watches = watches

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        found = self.watches.get(n)
        if found is not None:
            if not bool(torch.isfinite(value).all()):
                raise UsageError(
                    f"calibration met a value that is not finite at {n.name}: check the weights "
                    "and the images"
                )
            found([self._value(argument) for argument in _arguments(n)], value)
        return value

    def _value(self, argument: Any) -> Any:
        return fx.node.map_arg(argument, lambda node: self.env[node])


def _arguments(node: fx.Node) -> list[Any]:
    return all_arguments(node) if isinstance(node.target, torch._ops.OpOverload) else []
