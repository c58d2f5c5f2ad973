"""The copy of a graph that images are made with."""

from __future__ import annotations

import torch
from torch import Tensor

from ouro_compiler.frontend.capture import capture
from ouro_compiler.synthetic import detached_copy


class Positional(torch.nn.Module):
    """Makes a tensor of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(28))

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[-1], device=x.device)
        return (x * self.weight + places).mean((1, 2))


def test_a_copy_makes_its_own_tensors_where_the_images_are() -> None:
    gm = capture(Positional(), torch.randn(2, 1, 28, 28))
    copy = detached_copy(gm, torch.device("meta")).to("meta")
    assert copy(torch.empty(3, 1, 28, 28, device="meta")).device.type == "meta"
    assert gm(torch.randn(3, 1, 28, 28)).device.type == "cpu"


def test_a_copy_shares_no_gradients_with_the_model() -> None:
    model = Positional()
    gm = capture(model, torch.randn(2, 1, 28, 28))
    images = torch.randn(2, 1, 28, 28, requires_grad=True)
    detached_copy(gm, torch.device("cpu"))(images).sum().backward()
    assert images.grad is not None
    assert model.weight.grad is None
    assert model.weight.requires_grad
