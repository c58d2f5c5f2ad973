"""The columns that `linear_dynamic_outlier_kernel` corrects: one program a tile of rows.

A column is in a tile's list if its channel is listed at one of the tile's rows. The list has room
for every column: nothing overflows.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"])
def list_outlier_columns_kernel(
    outlier_start_ptr,  # (B, J, K)
    columns_ptr,  # int32 (tiles, K): the first counts[tile] entries are written, ascending
    counts_ptr,  # int32 (tiles,)
    rows,  # B * L
    LENGTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    WINDOW: tl.constexpr,
    REVERSE: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,  # rows at a time, divides BLOCK_M
    BLOCK_K: tl.constexpr,
):
    tile = tl.program_id(0)
    windows: tl.constexpr = (LENGTH + WINDOW - 1) // WINDOW
    found = 0
    for first_k in range(0, COLUMNS, BLOCK_K):
        offs_k = first_k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < COLUMNS
        union = tl.zeros((BLOCK_K,), tl.int32)
        for first_r in range(0, BLOCK_M, BLOCK_R):
            offs_r = first_r + tl.arange(0, BLOCK_R)
            if PER_SAMPLE:
                tiles: tl.constexpr = (LENGTH + BLOCK_M - 1) // BLOCK_M
                sample = tl.zeros((BLOCK_R,), tl.int32) + tile // tiles
                token = (tile % tiles) * BLOCK_M + offs_r
                mask_r = token < LENGTH
            else:
                row = tile * BLOCK_M + offs_r
                sample = row // LENGTH
                token = row % LENGTH
                mask_r = row < rows
            step = LENGTH - 1 - token if REVERSE else token
            window = sample.to(tl.int64) * windows + step // WINDOW
            offs = window[:, None] * COLUMNS + offs_k[None, :]
            mask = mask_r[:, None] & mask_k[None, :]
            start = tl.load(outlier_start_ptr + offs, mask=mask, other=0).to(tl.int32)
            listed = mask & (start <= (step % WINDOW)[:, None])
            union = tl.maximum(union, tl.max(listed.to(tl.int32), axis=0))
        place = found + tl.cumsum(union, axis=0) - 1
        out = tile.to(tl.int64) * COLUMNS + place
        tl.store(columns_ptr + out, offs_k, mask=union > 0)
        found += tl.sum(union, axis=0)
    tl.store(counts_ptr + tile, found)
