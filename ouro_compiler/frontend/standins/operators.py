"""torch's `associative_scan` as one operator of the graph, whatever the batch.

Its generic mode unrolls into a tree that fixes the batch, its pointwise mode refuses a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def associative_scan(
    combine_fn: Callable[..., Any], xs: Any, dim: int, reverse: bool = False
) -> Any:
    """Every prefix of xs combined; tensors of any shape, in any nest, with time at `dim`.

    combine_fn takes two nests of tensors without `dim`, and returns one.
    """
    from torch._higher_order_ops.associative_scan import associative_scan_op
    from torch._higher_order_ops.utils import _maybe_compile_and_run_fn

    leaves, nest = pytree.tree_flatten(xs)

    def combine(*both: Tensor) -> list[Any]:
        halves = both[: len(leaves)], both[len(leaves) :]
        first, second = (pytree.tree_unflatten(half, nest) for half in halves)
        return pytree.tree_leaves(combine_fn(first, second))

    def scan(step: Callable[..., Any], items: list[Tensor]) -> Any:
        return associative_scan_op(step, items, additional_inputs=())

    items = [torch.movedim(leaf, dim, 0) for leaf in leaves]
    if reverse:
        items = [item.flip([0]) for item in items]
    found = _maybe_compile_and_run_fn(scan, combine, items)
    if reverse:
        found = [one.flip([0]) for one in found]
    return pytree.tree_unflatten([torch.movedim(one, 0, dim) for one in found], nest)
