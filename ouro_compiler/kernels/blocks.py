"""Block sizes, warps and forms of kernels by default.

They follow from shapes, so that a model's kernels can be compiled ahead and nothing needs tuning.
Only a scan's depend on the batch, and on the GPU: none of its forms changes a bit. What was tuned
on a GPU (`tuned.py`) takes their place.
"""

from __future__ import annotations

import functools
import math

import torch

from ouro_compiler.kernels.launch import interpreting

_LONGEST_GRID = 65_535  # in the second and third dimension


def next_power_of_2(value: int) -> int:
    """The smallest power of two that is at least `value`, a positive integer."""
    return 1 << (value - 1).bit_length()


def quantizer_warps(columns: int) -> int:
    """Warps for a row: eight columns a lane at most, where there are enough warps."""
    return max(1, min(8, next_power_of_2(columns) // 256))


def linear_blocks(rows_of_weight: int, bytes_a_row: int, *, fp32_outliers: bool) -> dict[str, int]:
    """BLOCK_M/N/K of a product with a weight of (rows, bytes).

    64 rows: more make the lists of a tile longer, since windows are some 10 tokens. Outliers in
    fp32 are multiplied without tensor cores: wider tiles spill.
    """
    block_n = max(16, min(64 if fp32_outliers else 128, next_power_of_2(rows_of_weight)))
    for block_k in (64, 32):
        if bytes_a_row % block_k == 0:
            return {"BLOCK_M": 64, "BLOCK_N": block_n, "BLOCK_K": block_k}
    return {
        "BLOCK_M": 64,
        "BLOCK_N": block_n,
        "BLOCK_K": max(32, min(64, next_power_of_2(bytes_a_row))),
    }


def linear_warps(block_n: int) -> int:
    """Warps of a program of a product by default: 64 rows by BLOCK_N outputs."""
    return 8 if block_n >= 64 else 4


def scan_channels(channels: int) -> int:
    """Channels a program of a scan: one a lane."""
    return min(32, next_power_of_2(channels))


def scan_blocks(
    channels: int, states: int, length: int, scans: int, multiprocessors: int
) -> dict[str, int]:
    """The form of a scan of (scans, channels, length): constants that no bit depends on but CHUNK.

    A lane has a channel, where that keeps the GPU busy: two programs a multiprocessor, since two
    directions are one launch and a multiprocessor has four schedulers. Else, and beyond 32 states,
    four lanes share a channel's states (SHARE): four times the programs, each token in half the
    instructions.
    STEPS is how many tokens' operands are held: four, to wait for none of them; one where a lane
    has many states, whose registers are many and whose tokens take long enough.
    CHUNK is `scan_chunk`'s. SPLIT gives each chunk its programs, in a launch more that reads u,
    delta and B once more: worth it while the GPU is idle otherwise. Four directions are one launch:
    beyond half a program a multiprocessor, memory takes longer than a scan's tokens do.
    """
    lanes = min(4, next_power_of_2(states))
    block_d = scan_channels(channels)
    blocks = -(-channels // block_d)
    chunk = scan_chunk(length, states)
    alone = chunk == length and (scans * blocks < 2 * multiprocessors or states > 32)
    share = lanes if alone else 1
    steps = min(4 if states <= 4 * share else 1, length)
    if chunk < length:
        steps = math.gcd(4, chunk)
    split = chunk < length and 2 * scans * blocks < multiprocessors
    return {
        "LANES": lanes,
        "SHARE": share,
        "STEPS": steps,
        "BLOCK_D": block_d if share == 1 else 32 // share,
        "CHUNK": chunk,
        "SPLIT": int(split and blocks * (length // chunk) <= _LONGEST_GRID),
    }


@functools.cache
def scan_chunk(length: int, states: int) -> int:
    """Tokens of a chunk: a divisor of `length`, or all of it; from the shape alone.

    Long scans of few states, as VMamba's first stages have them: beside four states' exponentials a
    second state costs little. A program walks chunk tokens twice, and what the chunks before it
    left, length / chunk pairs that take a third of a token each: sqrt(length / 6) is the best.
    """
    if states > 4 or length < 256:
        return length
    least = math.isqrt(length // 6)
    fits = [one for one in range(max(2, least), length // 4 + 1) if length % one == 0]
    return min(fits, key=lambda one: (one % 4 != 0, one), default=length)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a CUDA device; of an H100 where that is not known, as when kernels are compiled ahead.

    An interpreter is one: its programs run one after the other.
    """
    if interpreting():
        return 1
    if device.type != "cuda" or not torch.cuda.is_available():
        return 132
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
