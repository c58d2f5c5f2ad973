"""Launch of the scan with a quantized recurrence."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ouro_compiler.kernels.blocks import next_power_of_2, scan_channels
from ouro_compiler.kernels.launch import contiguous, launch
from ouro_compiler.kernels.quantize import FLOATS
from ouro_compiler.kernels.spec import Template, make_spec
from ouro_compiler.ops.library import empty_token_major
from ouro_compiler.ops.quantized_scan import check, log2_offset

_MAX_STATES = 32  # a channel's states, decays and inputs live in one lane's registers


def refuse_quantized_scan(*args: Any) -> str | None:
    """Why no kernel runs this scan; None if one does."""
    for tensor in args[:13]:
        if tensor is not None and tensor.dtype not in FLOATS:
            return f"kernels scan fp16, bf16 and fp32, got {tensor.dtype}"
    states = args[2].shape[-1]
    if states > _MAX_STATES:
        return f"{states} states a channel do not fit a lane's registers"
    return None


def quantized_selective_scan(
    u: Tensor,
    step: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    decay_scale: Tensor | None,
    input_scale: Tensor | None,
    input_threshold: Tensor | None,
    state_scale: Tensor | None,
    state_threshold: Tensor | None,
    state_factor: Tensor | None,
    decay_limit: float,
    decay_steps: int,
    bits: int,
    outlier_bits: int,
    refresh_period: int,
    output_before_rounding: bool,
    reverse: bool,
) -> Tensor:
    """`quantized_selective_scan_ref` by kernel; every matrix may have any strides."""
    check(
        *(u, step, A, B, C, D, z, decay_scale, input_scale, input_threshold, state_scale),
        *(state_threshold, state_factor, decay_limit, decay_steps, bits, outlier_bits),
        refresh_period,
    )
    batch, channels, length = u.shape
    B, C = (matrix[:, None] if matrix.dim() == 3 else matrix for matrix in (B, C))
    groups = B.shape[1]
    in_group = channels // groups
    y = empty_token_major(u)
    block_d = scan_channels(in_group)
    spec = make_spec(
        Template.QUANTIZED_SCAN,
        {
            "LENGTH": length,
            "CHANNELS": in_group,
            "STATES": A.shape[1],
            "REVERSE": reverse,
            "HAS_D": D is not None,
            "HAS_Z": z is not None,
            "DECAY": 2 if decay_steps else 0 if decay_scale is None else 1,
            "DECAY_STEPS": decay_steps,
            "HAS_INPUT": input_scale is not None,
            "HAS_INPUT_THRESHOLD": input_threshold is not None,
            "HAS_STATE": state_scale is not None,
            "HAS_STATE_THRESHOLD": state_threshold is not None,
            "HAS_FACTOR": state_factor is not None,
            "BITS": bits,
            "OUTLIER_BITS": outlier_bits,
            "PERIOD": min(refresh_period, length),
            "BEFORE_ROUNDING": output_before_rounding,
            "BLOCK_N": next_power_of_2(A.shape[1]),
            "BLOCK_D": block_d,
        },
        num_warps=1,
        num_stages=1,
    )
    named = {
        "decay_scale": decay_scale,
        "input_scale": input_scale,
        "input_threshold": input_threshold,
        "state_scale": state_scale,
        "state_threshold": state_threshold,
        "state_factor": state_factor,
    }
    vectors = [None if one is None else contiguous(one, name) for name, one in named.items()]
    strides = (
        *A.stride(),
        *u.stride(),
        *step.stride(),
        *((0, 0, 0) if z is None else z.stride()),
        *B.stride(),
        *C.stride(),
        channels,
    )
    skip = None if D is None else contiguous(D, "D")
    grid = (batch, groups, -(-in_group // block_d))
    offset = log2_offset(decay_limit, decay_steps)
    launch(spec, grid, u, step, A, B, C, skip, z, *vectors, y, offset, *strides)
    return y
