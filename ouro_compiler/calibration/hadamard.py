"""Hadamard matrices: orders 2^n * m, m = 1 or from a construction of Paley's.

A Hadamard matrix H (n, n) has entries of +1 and -1 and H @ H.T = n I: over sqrt(n) it is a rotation
that spreads every channel over all others.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=16)
def hadamard(order: int) -> Tensor | None:
    """A Hadamard matrix (order, order) of fp32 +1 and -1; None where none is constructed here.

    Sylvester's doubling as far as the order is even and its half has one (1, 2, 4, ... and twice
    the others); else Paley's first construction, order - 1 a prime of 3 modulo 4, or his second,
    order / 2 - 1 a prime of 1 modulo 4. Of the orders up to 200 that are multiples of 4 these leave
    out 52, 92, 100, 116, 156, 172, 184 and 188.
    """
    if order == 1:
        return torch.ones(1, 1)
    half = hadamard(order // 2) if order % 2 == 0 else None
    if half is not None:
        return torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), half)
    if order % 4:
        return None
    if _is_prime(order - 1):
        return _paley_first(order - 1)
    if _is_prime(order // 2 - 1) and order // 2 % 4 == 2:
        return _paley_second(order // 2 - 1)
    return None


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % d for d in range(2, int(number**0.5) + 1))


def _residues(prime: int) -> Tensor:
    """The Jacobsthal matrix (p, p): entry (i, j) is 1 where i - j is a square modulo p, 0 at i = j,
    else -1."""
    squares = {i * i % prime for i in range(1, prime)}
    symbol = torch.tensor([0.0] + [1.0 if i in squares else -1.0 for i in range(1, prime)])
    index = torch.arange(prime)
    return symbol[(index[:, None] - index) % prime]


def _paley_first(prime: int) -> Tensor:
    """Order p + 1: I + S with S skew."""
    skew = torch.zeros(prime + 1, prime + 1)
    skew[0, 1:], skew[1:, 0] = 1.0, -1.0
    skew[1:, 1:] = _residues(prime)
    return torch.eye(prime + 1) + skew


def _paley_second(prime: int) -> Tensor:
    """Order 2 (p + 1): the symmetric conference matrix C gives C x [[1, 1], [1, -1]] + I x
    [[1, -1], [-1, -1]]."""
    conference = torch.ones(prime + 1, prime + 1)
    conference[0, 0] = 0.0
    conference[1:, 1:] = _residues(prime)
    return torch.kron(conference, torch.tensor([[1.0, 1.0], [1.0, -1.0]])) + torch.kron(
        torch.eye(prime + 1), torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
    )
