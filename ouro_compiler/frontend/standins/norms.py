"""What stands in for `mamba_ssm.ops.triton.layer_norm`, whose Triton kernels need a CUDA device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import ouro_compiler.ops  # noqa: F401  (registers torch.ops.ouro)
from ouro_compiler.frontend.standins.refusals import refuse_given, refuse_training, refusing


def add_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The norm of x + residual; with `prenorm` also the sum.

    The sum has the residual's dtype; `residual_in_fp32` counts where there is none yet.
    """
    fp32 = residual_in_fp32 and residual is None
    y, total = torch.ops.ouro.add_norm(x, residual, weight, bias, eps, is_rms_norm, fp32)
    return (y, total) if prenorm else y


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`layer_norm_fn` of mamba_ssm, without dropout and without a second input or norm."""
    refuse_training("layer_norm_fn", x, weight, bias, residual)
    refuse_given(
        "layer_norm_fn",
        x1=x1,
        weight1=weight1,
        bias1=bias1,
        rowscale=rowscale,
        dropout_p=dropout_p or None,
        return_dropout_mask=return_dropout_mask,
    )
    return add_norm(x, weight, bias, residual, eps, prenorm, residual_in_fp32, is_rms_norm)


def rms_norm_fn(x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any) -> Any:
    """`rms_norm_fn` of mamba_ssm: layer_norm_fn without `is_rms_norm`."""
    kwargs["is_rms_norm"] = True
    return layer_norm_fn(x, weight, bias, *args, **kwargs)


class RMSNorm(nn.Module):
    """`RMSNorm` of mamba_ssm, with its state_dict keys."""

    bias: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dropout_p: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.drop = nn.Dropout(dropout_p) if dropout_p > 0 else None
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
    ) -> Any:
        """The norm of x + residual; with `prenorm` also the sum."""
        return rms_norm_fn(
            x,
            self.weight,
            self.bias,
            residual=residual,
            eps=self.eps,
            dropout_p=self.drop.p if self.drop is not None and self.training else 0.0,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
        )


_OTHER = "it is not supported; use layer_norm_fn or rms_norm_fn"

NORMS: dict[str, Any] = {
    "RMSNorm": RMSNorm,
    "layer_norm_fn": layer_norm_fn,
    "rms_norm_fn": rms_norm_fn,
    "_layer_norm_fwd": refusing("_layer_norm_fwd", _OTHER),
    "layer_norm_linear_fn": refusing("layer_norm_linear_fn", _OTHER),
}
