"""`ouro::linear_dynamic_outlier`: a (BLOCK_M, BLOCK_N) tile of the output a program.

acc is the product of all codes; acc_o that of the listed ones alone, over the columns that are
listed at one of the tile's rows. Both are exact. Dequantization and what follows are the epilogue.

Where MATRIX_BITS is 4, acc is first the product of the low nibbles of all codes, which inliers are.
What that is over the listed columns is taken away again, and acc_o added: the same integers.
"""

import triton
import triton.language as tl

from ouro_compiler.kernels.templates.common import (  # noqa: F401  (epilogue)
    gelu,
    gelu_tanh,
    silu,
    softplus,
)


@triton.jit
def nibbles(packed, INLINE_ASM: tl.constexpr):
    """(low, high) codes, times 16, as int8: four bytes an instruction on a GPU."""
    if INLINE_ASM:
        low = tl.inline_asm_elementwise(
            "{ .reg .b32 t; shl.b32 t, $1, 4; and.b32 $0, t, 0xF0F0F0F0; }",
            "=r,r",
            [packed],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )
        high = tl.inline_asm_elementwise(
            "and.b32 $0, $1, 0xF0F0F0F0;", "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4
        )
    else:
        low = ((packed << 4) & 0xF0).to(tl.int8, bitcast=True)
        high = (packed & 0xF0).to(tl.int8, bitcast=True)
    return low, high


@triton.jit
def pair(low, high, INLINE_ASM: tl.constexpr):
    """Bytes with low nibbles of `low` and those of `high` above them: codes as weights are packed.

    No GPU has the instruction: `kernels/int4_matrix.py` writes it as others and makes the products
    of what it returns products of nibbles. Compiled without, it is an error.
    """
    if INLINE_ASM:
        return tl.inline_asm_elementwise(
            "ouro.pair.s4 $0, $1, $2;", "=r,r,r", [low, high], dtype=tl.int8, is_pure=True, pack=4
        )
    return (low & 0x0F) | (high << 4)


@triton.jit
def dot_nibbles(a, b, acc, INLINE_ASM: tl.constexpr):
    """acc + the product of all nibbles of a (M, bytes), which `pair` made, and b (bytes, N)."""
    if INLINE_ASM:
        acc = tl.dot(a, b, acc, out_dtype=tl.int32)
    else:
        acc = tl.dot((a << 4) >> 4, (b << 4) >> 4, acc, out_dtype=tl.int32)
        acc = tl.dot(a >> 4, b >> 4, acc, out_dtype=tl.int32)
    return acc


@triton.jit(do_not_specialize=["rows"])
def linear_dynamic_outlier_kernel(
    codes_ptr,  # int8 (B, L, K), contiguous
    inlier_scale_ptr,  # (L,)
    outlier_scale_ptr,  # fp32 (B, L)
    outlier_start_ptr,  # (B, J, K)
    columns_ptr,  # int32 (tiles, K): columns listed in a tile of rows, ascending; made here
    x_ptr,  # (B, L, K) where OUTLIER_BITS is 16, else None
    qweight_ptr,  # int8 (O, K), or packed uint8 (O, ceil(K / 2))
    weight_scale_ptr,  # (O,), or (1,)
    bias_ptr,  # (O,), or None
    residual_ptr,  # (B, L, O), contiguous, or None
    y_ptr,  # (B, L, O), contiguous
    rows,  # B * L
    stride_xb,
    stride_xl,
    stride_xk,
    LENGTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    WINDOW: tl.constexpr,
    REVERSE: tl.constexpr,
    INLIER_BITS: tl.constexpr,
    OUTLIER_BITS: tl.constexpr,
    PACKED: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    SCALE_PER_OUTPUT: tl.constexpr,
    INLINE_ASM: tl.constexpr,
    EVEN_K: tl.constexpr,  # no tile of K is ragged
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # bytes of weight a step
    BLOCK_O: tl.constexpr,  # outlier columns a step
    MATRIX_BITS: tl.constexpr,  # of the factors of the product of all codes: 8, or 4
    NEVER: tl.constexpr,
    PER_WORD: tl.constexpr,  # columns listed at a time: four bytes, or one value
    SAMPLE_WINDOWS: tl.constexpr,  # windows of one sample that a tile meets at most
    BLOCK_R: tl.constexpr,  # all windows that a tile meets at most
    BLOCK_L: tl.constexpr,  # words a step when listing
):
    tiles_n: tl.constexpr = (OUTPUTS + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0) // tiles_n
    offs_n = (tl.program_id(0) % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < OUTPUTS
    # Addresses: a 64-bit base of the tile, 32-bit offsets inside it (wide offsets cost registers).
    # Rows and outputs past the end are clamped, not masked: unpredicated loads pipeline better.
    offs_m = tl.arange(0, BLOCK_M)
    if PER_SAMPLE:
        tiles_m: tl.constexpr = (LENGTH + BLOCK_M - 1) // BLOCK_M
        first_token = (tile % tiles_m) * BLOCK_M
        first_row = (tile // tiles_m).to(tl.int64) * LENGTH + first_token
        left_m = LENGTH - first_token
    else:
        first_row = tile.to(tl.int64) * BLOCK_M
        first_token = (first_row % LENGTH).to(tl.int32)
        left_m = (rows - first_row).to(tl.int32)
    first_sample = first_row // LENGTH
    row = tl.minimum(offs_m, left_m - 1)
    out = tl.minimum(offs_n, OUTPUTS - 1)
    sample = (first_token + row) // LENGTH
    token = (first_token + row) % LENGTH
    half: tl.constexpr = (COLUMNS + 1) // 2 if PACKED else COLUMNS  # bytes of one weight row

    # The columns that a window which the tile meets lists at all. Every program of a tile of rows
    # writes the same list, with room for every column.
    windows: tl.constexpr = (LENGTH + WINDOW - 1) // WINDOW
    outlier_start_ptr += first_sample * windows * COLUMNS
    columns_ptr += tile.to(tl.int64) * COLUMNS
    met = tl.arange(0, BLOCK_R) // SAMPLE_WINDOWS * LENGTH  # each sample's first row
    first_met = tl.maximum(first_token - met, 0)
    last_met = tl.minimum(first_token + tl.minimum(left_m, BLOCK_M) - met, LENGTH) - 1
    low_step = LENGTH - 1 - last_met if REVERSE else first_met
    high_step = LENGTH - 1 - first_met if REVERSE else last_met
    window = low_step // WINDOW + tl.arange(0, BLOCK_R) % SAMPLE_WINDOWS
    is_met = (first_met <= last_met) & (window * WINDOW <= high_step)
    met_row = (met // LENGTH * windows + window) * (COLUMNS // PER_WORD)
    found = 0
    for first_l in range(0, COLUMNS // PER_WORD, BLOCK_L):
        offs_l = first_l + tl.arange(0, BLOCK_L)
        mask = is_met[:, None] & (offs_l < COLUMNS // PER_WORD)[None, :]
        offs = met_row[:, None] + offs_l[None, :]
        if PER_WORD == 4:  # bytes of a word: 255 where a window never lists a column, else 1 below
            word_ptr = outlier_start_ptr.to(tl.pointer_type(tl.int32))
            other = ~tl.load(word_ptr + offs, mask=mask, other=-1)
            lists = ((((other & 0x7F7F7F7F) + 0x7F7F7F7F) | other) >> 7) & 0x01010101
        else:
            lists = (tl.load(outlier_start_ptr + offs, mask=mask, other=NEVER) != NEVER).to(
                tl.int32
            )
        lists = tl.sum(lists, axis=0)  # a byte holds BLOCK_R
        count = tl.zeros((BLOCK_L,), tl.int32)
        for byte in tl.static_range(PER_WORD):
            count += ((lists >> (8 * byte)) & 0xFF > 0).to(tl.int32)
        place = found + tl.cumsum(count, axis=0) - count
        for byte in tl.static_range(PER_WORD):
            is_listed = (lists >> (8 * byte)) & 0xFF > 0
            tl.store(columns_ptr + place, offs_l * PER_WORD + byte, mask=is_listed)
            place += is_listed.to(tl.int32)
        found += tl.sum(count, axis=0)
    tl.debug_barrier()  # what one thread stored, others load

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    offs_k = tl.arange(0, BLOCK_K)
    codes_ptr += first_row * COLUMNS
    code_ptrs = codes_ptr + (row[:, None] * COLUMNS + offs_k[None, :])
    weight_ptrs = qweight_ptr + (out[None, :] * half + offs_k[:, None])
    for first_k in range(0, half, BLOCK_K):
        if EVEN_K:
            weight = tl.load(weight_ptrs)
            codes = tl.load(code_ptrs)
        else:
            left = offs_k < half - first_k
            weight = tl.load(weight_ptrs, mask=left[:, None], other=0)
            codes = tl.load(code_ptrs, mask=left[None, :], other=0)
        if MATRIX_BITS == 4:
            if EVEN_K:
                high = tl.load(code_ptrs + half)
            else:
                left = offs_k < COLUMNS - half - first_k
                high = tl.load(code_ptrs + half, mask=left[None, :], other=0)
            codes = pair(codes, high, INLINE_ASM)
            acc = dot_nibbles(codes, weight.to(tl.int8, bitcast=True), acc, INLINE_ASM)
        elif PACKED:
            low, high = nibbles(weight, INLINE_ASM)
            acc = tl.dot(codes, low, acc, out_dtype=tl.int32)
            if EVEN_K:
                codes = tl.load(code_ptrs + half)
            else:
                left = offs_k < COLUMNS - half - first_k
                codes = tl.load(code_ptrs + half, mask=left[None, :], other=0)
            acc = tl.dot(codes, high, acc, out_dtype=tl.int32)
        else:
            acc = tl.dot(codes, weight, acc, out_dtype=tl.int32)
        code_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K
    if MATRIX_BITS == 4:
        acc = -(acc << 4)  # what is to be taken away is added: minus 16 times what is wanted
    elif PACKED:
        acc = acc >> 4  # the nibbles were times 16

    step = LENGTH - 1 - token if REVERSE else token
    start_row = (sample * windows + step // WINDOW) * COLUMNS
    position = step % WINDOW
    offs_o = tl.arange(0, BLOCK_O)
    tl.static_assert(MATRIX_BITS == 8 or (PACKED and INLIER_BITS <= 4 and OUTLIER_BITS <= 8))
    if OUTLIER_BITS == 16:
        acc_o = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    else:
        acc_o = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for first_o in range(0, found, BLOCK_O):
        valid = first_o + offs_o < found
        column = tl.load(columns_ptr + first_o + offs_o, mask=valid, other=0)
        start = tl.load(outlier_start_ptr + (start_row[:, None] + column[None, :])).to(tl.int32)
        listed = valid[None, :] & (start <= position[:, None])
        if PACKED:
            byte = tl.where(column < half, column, column - half)
            packed = tl.load(qweight_ptr + (out[None, :] * half + byte[:, None]))
            shift = tl.where(column < half, 4, 0).to(tl.uint8)
            weight = ((packed << shift[:, None]) & 0xF0).to(tl.int8, bitcast=True) >> 4
        else:
            weight = tl.load(qweight_ptr + (out[None, :] * half + column[:, None]))
        if OUTLIER_BITS == 16:
            rows_x = x_ptr + first_sample * stride_xb + token.to(tl.int64) * stride_xl
            x = tl.load(rows_x[:, None] + (column * stride_xk)[None, :])
            x = tl.where(listed, x, 0.0)
            # Codes are exact in every type, and so is bf16 in tf32.
            if x_ptr.dtype.element_ty == tl.float16:
                acc_o = tl.dot(x, weight.to(tl.float16), acc_o)
            elif x_ptr.dtype.element_ty == tl.bfloat16:
                x, weight = x.to(tl.float32), weight.to(tl.float32)
                acc_o = tl.dot(x, weight, acc_o, input_precision="tf32")
            else:
                acc_o = tl.dot(x, weight.to(tl.float32), acc_o, input_precision="ieee")
        else:
            outlier = tl.load(codes_ptr + (row[:, None] * COLUMNS + column[None, :]))
            outlier = tl.where(listed, outlier, 0).to(tl.int8)
            acc_o = tl.dot(outlier, weight, acc_o, out_dtype=tl.int32)
            if MATRIX_BITS == 4:  # of these codes the product above had the low nibbles
                low, high = nibbles(outlier.to(tl.uint8, bitcast=True), INLINE_ASM)
                acc = tl.dot(low, weight, acc, out_dtype=tl.int32)
    if MATRIX_BITS == 4:
        acc = acc_o - (acc >> 4)

    inlier_scale = tl.load(inlier_scale_ptr + token).to(tl.float32)[:, None]
    if OUTLIER_BITS == 16:
        y = acc.to(tl.float32) * inlier_scale + acc_o
    else:
        outlier_scale = tl.load(outlier_scale_ptr + first_row + row)[:, None]
        y = (acc - acc_o).to(tl.float32) * inlier_scale + acc_o.to(tl.float32) * outlier_scale
    if SCALE_PER_OUTPUT:
        y *= tl.load(weight_scale_ptr + out).to(tl.float32)[None, :]
    else:
        y *= tl.load(weight_scale_ptr).to(tl.float32)
    mask = (offs_m < left_m)[:, None] & mask_n[None, :]
    offs = row[:, None] * OUTPUTS + out[None, :]
    # <epilogue>
    # </epilogue>
    tl.store(y_ptr + first_row * OUTPUTS + offs, y.to(y_ptr.dtype.element_ty), mask=mask)
