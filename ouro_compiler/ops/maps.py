"""Maps in place of sequences: pixel (h, w) of a map with W columns is its token h * W + w.

Quantizers and scans take a map of any strides where they take tokens. VMamba's column-major order
is then the transposed view of its map, which nothing has to copy.
"""

from __future__ import annotations

from torch import Tensor

Shape = tuple[int, int, int]


def tokens_shape(x: Tensor) -> Shape | None:
    """(B, L, K) of tokens (B, L, K) or of a map (B, H, W, K); None of anything else."""
    if x.dim() == 3:
        return (x.shape[0], x.shape[1], x.shape[2])
    return (x.shape[0], x.shape[1] * x.shape[2], x.shape[3]) if x.dim() == 4 else None


def sequence_shape(u: Tensor) -> Shape | None:
    """(B, D, L) of a sequence (B, D, L) or of a map (B, D, H, W); None of anything else."""
    if u.dim() == 3:
        return (u.shape[0], u.shape[1], u.shape[2])
    return (u.shape[0], u.shape[1], u.shape[2] * u.shape[3]) if u.dim() == 4 else None


def as_tokens(x: Tensor) -> Tensor:
    """(B, L, K) or (B, H, W, K) as (B, L, K); a copy where strides forbid a view."""
    return x.flatten(1, 2) if x.dim() == 4 else x


def as_sequence(u: Tensor) -> Tensor:
    """(B, D, L) or (B, D, H, W) as (B, D, L); a copy where strides forbid a view."""
    return u.flatten(2) if u.dim() == 4 else u
