"""A pass of one's own: edits a captured graph, and the runner checks what it left.

This one drops `x + 0`, which a careless model computes. How a pass becomes part of the pipeline is
in CONTRIBUTING.md.
"""

import torch
from torch import Tensor, fx, nn

from ouro_compiler.frontend.capture import capture
from ouro_compiler.graph import is_op, replace_node
from ouro_compiler.inspection import diff
from ouro_compiler.inspection.network import build_network
from ouro_compiler.passes import NORMALIZE
from ouro_compiler.passes.base import PassContext, run_passes


class Careless(nn.Module):
    """Adds nothing, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(784, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(images.flatten(1) + 0) + 0


def drop_added_zeros(gm: fx.GraphModule, ctx: PassContext) -> bool:
    """x + 0 becomes x where shape and dtype stay. Refuses nothing."""
    modified = False
    for node in list(gm.graph.nodes):
        if not is_op(node, torch.ops.aten.add.Tensor) or node.args[1] != 0:
            continue
        source = node.args[0]
        before, after = source.meta["val"], node.meta["val"]
        if (before.shape, before.dtype) == (after.shape, after.dtype):
            replace_node(node, source)
            modified = True
    return modified


torch.manual_seed(0)
model, images = Careless().eval(), torch.randn(4, 1, 28, 28)
gm = capture(model, images)
run_passes(gm, NORMALIZE, PassContext())
before = build_network(gm)
print("changed by:", run_passes(gm, (drop_added_zeros,), PassContext()))
print("again:", run_passes(gm, (drop_added_zeros,), PassContext()))  # a pass finishes its work
print(diff(before, gm))
with torch.no_grad():
    print("same outputs:", torch.equal(gm(images), model(images)))
