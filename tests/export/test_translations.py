"""ATen ops, norms and convolutions in onnxruntime are what torch computes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ouro_compiler.errors import ModelError
from tests.export.graphs import onnx_of, run
from tests.helpers import assert_close, randn

OURO = torch.ops.ouro
VECTOR, SQUARE = randn(1, 6), randn(2, 6, 6)
Function = Callable[[Tensor], Tensor]

# Each takes (B, 4, 6).
SMALL: dict[str, Function] = {
    "unary": lambda x: (x.exp() + x.neg().relu() + x.sigmoid() + x.tanh().abs()).sqrt().log(),
    "more unary": lambda x: x.sin() + x.cos() + x.erf() + x.floor() + (x.square() + 1).rsqrt(),
    "numbers": lambda x: (2 - x) * 3 + x / 2 - torch.add(x, x, alpha=2) + (x * x + 1) ** 1.5,
    "bounds": lambda x: x.clamp(-1, 0.5) + x.clamp(min=0) + F.hardtanh(x) + x.clamp(max=0.1),
    "activations": lambda x: F.silu(x) + F.gelu(x) + F.softplus(x) + F.gelu(x, approximate="tanh"),
    "more activations": lambda x: F.hardswish(x) + F.hardsigmoid(x) + F.softmax(x, -1),
    "comparisons": lambda x: torch.where(x > 0, x, -1.0) + torch.where(x <= x.flip(1), 0.0, x),
    "two tensors": lambda x: torch.maximum(x, x.flip(2)) + torch.minimum(x, VECTOR) - x / VECTOR,
    "reductions": lambda x: x.mean(-1) + x.sum((2,)) + x.amax(2) - x.amin(-1) + x.mean(),
    "views": lambda x: x.flatten(1).unflatten(1, (6, 4)).transpose(1, 2)[:, None].squeeze(1),
    "folded batch": lambda x: (x.reshape(-1, 6) @ SQUARE).view(-1, 4, 6).permute(0, 2, 1),
    "cuts": lambda x: torch.cat((x[:, 1:3], x[:, ::2], x[:, -1:].repeat(1, 2, 1)), dim=1),
    "parts": lambda x: sum(x.chunk(2, -1)) * x.split([1, 3], 1)[0][..., :3]
    + x.unbind(1)[2][:, None, :3],
    "stacked": lambda x: torch.stack((x, x.roll(1, 2), x.roll(-2, 1)), dim=-1),
    "batch sizes": lambda x: torch.cat((VECTOR.expand(x.shape[0], 1, 6), x), dim=1),
    "twice the batch": lambda x: VECTOR.expand(2 * x.shape[0], 6).unflatten(0, (-1, 2)).sum(1),
    "padding": lambda x: F.pad(x, (1, 2), value=3.0) + F.pad(x, (3, 0), mode="replicate"),
    "products": lambda x: x @ SQUARE
    + torch.einsum("btk,ko->bto", x, SQUARE)
    + F.linear(x, SQUARE, VECTOR),
    "layer norm": lambda x: F.layer_norm(x, (6,), VECTOR, VECTOR) + F.layer_norm(x, (4, 6)),
    "rms norm": lambda x: F.rms_norm(x, (6,), VECTOR) + F.rms_norm(x, (6,), eps=1e-3),
    "group norm": lambda x: F.group_norm(x, 2, VECTOR[:4], VECTOR[:4]),
    "add norm": lambda x: sum(OURO.add_norm(x, x.exp(), VECTOR, VECTOR, 1e-5, False, True)),
    "add rms norm": lambda x: sum(OURO.add_norm(x, None, VECTOR, None, 1e-5, True, False)),
    "causal conv": lambda x: OURO.causal_conv1d(x, SQUARE[:4, :3], VECTOR[:4], True, False),
    "reversed conv": lambda x: OURO.causal_conv1d(x, SQUARE[:4, :3], None, False, True),
    "depthwise conv": lambda x: OURO.depthwise_conv(x, SQUARE[:4, None, :4], VECTOR[:4], True),
    "attention": lambda x: F.scaled_dot_product_attention(x, x.flip(1), x, scale=0.3),
    "masked attention": lambda x: F.scaled_dot_product_attention(x, x, x, SQUARE[:4, :4])
    + F.scaled_dot_product_attention(x, x, x, SQUARE[:4, :4] > -0.5),
}  # fmt: skip
KERNEL = randn(3, 4, 1, 3, 3)
# Each takes (B, 4, 6, 6).
MAPS: dict[str, Function] = {
    "convolutions": lambda x: F.conv2d(x, KERNEL, groups=4, padding=1, stride=2),
    "same": lambda x: F.conv2d(x, KERNEL[..., :2], VECTOR[:4], groups=4, padding="same"),
    "depthwise map": lambda x: OURO.depthwise_conv(x, KERNEL[..., :2], None, False),
    "batch norm": lambda x: F.batch_norm(x, VECTOR[:4], VECTOR[:4].square(), eps=1e-3),
    "pooling": lambda x: (
        F.max_pool2d(x, 2) + F.avg_pool2d(x, 3, 2, 1) + F.adaptive_avg_pool2d(x, 1)
    ),
    "orders": lambda x: OURO.cross_merge(OURO.cross_scan(x), 6, 6),
}


# What is written in another way before a later opset.
CHANGED = ("activations", "padding", "layer norm", "reductions")


@pytest.mark.parametrize(
    ("name", "opset"),
    [*((name, 21) for name in (*SMALL, *MAPS)), *((name, 18) for name in CHANGED)],
)
def test_function(name: str, opset: int) -> None:
    class Module(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (SMALL | MAPS)[name](x)

    x = randn(4, 5, 4, 6) if name in SMALL else randn(5, 5, 4, 6, 6)
    if name == "unary":
        x = x.abs()
    proto = onnx_of(Module(), x[:2], opset=opset)
    for batch in (x, x[:1]):
        assert_close(torch.from_numpy(run(proto, batch)[0]), Module()(batch), 2e-6)


def test_an_op_without_a_translation_is_named() -> None:
    class Module(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.rfft(x).real + torch.cumprod(x, 1)[..., :4]

    with pytest.raises(
        ModelError, match=r"no translation for aten\.cumprod\.default, aten\.fft_rfft"
    ):
        onnx_of(Module(), randn(0, 2, 4, 6))
