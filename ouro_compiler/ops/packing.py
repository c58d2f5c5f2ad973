"""`ouro::pack_int4`, `ouro::unpack_int4`: two 4-bit codes a byte, in K-halves (METHODS 4.1).

Byte j of a row holds code j in its low nibble and code j + ceil(K/2) in its high nibble, both in
two's complement; an odd K is padded with one zero code. The same layout in files and in memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ouro_compiler.ops.library import define_op, reject


def pack_int4_ref(codes: Tensor) -> Tensor:
    """int8 codes in [-8, 7], (..., K) -> uint8 (..., ceil(K/2))."""
    if codes.dtype != torch.int8:
        reject("pack_int4", f"codes must be int8, got {codes.dtype}")
    padded = F.pad(codes, (0, codes.shape[-1] % 2))
    low, high = padded.chunk(2, dim=-1)
    # In uint8 arithmetic a negative code keeps its low nibble: -1 -> 0xFF -> 0xF.
    return ((low.view(torch.uint8) & 0xF) | (high.view(torch.uint8) << 4)).contiguous()


def unpack_int4_ref(packed: Tensor, length: int) -> Tensor:
    """uint8 (..., ceil(length/2)) -> int8 codes (..., length)."""
    if packed.dtype != torch.uint8 or packed.shape[-1] != (length + 1) // 2:
        reject("unpack_int4", f"cannot take {length} codes from {packed.dtype} {packed.shape}")
    low = ((packed << 4).view(torch.int8)) >> 4  # arithmetic shift brings the sign back
    high = packed.view(torch.int8) >> 4
    return torch.cat((low, high), dim=-1)[..., :length].contiguous()


define_op(
    "pack_int4(Tensor codes) -> Tensor",
    implementation=pack_int4_ref,
    fake=lambda codes: codes.new_empty(
        (*codes.shape[:-1], (codes.shape[-1] + 1) // 2), dtype=torch.uint8
    ),
)
define_op(
    "unpack_int4(Tensor packed, int length) -> Tensor",
    implementation=unpack_int4_ref,
    fake=lambda packed, length: packed.new_empty((*packed.shape[:-1], length), dtype=torch.int8),
)
