"""The pipeline: every pass in the order it runs, each position with its reason."""

from __future__ import annotations

from ouro_compiler.passes.base import Pass
from ouro_compiler.passes.fold_constants import fold_constants
from ouro_compiler.passes.fold_delta_bias import fold_delta_bias
from ouro_compiler.passes.fuse_dequantize_epilogue import fuse_dequantize_epilogue
from ouro_compiler.passes.insert_quantize_dequantize import insert_quantize_dequantize
from ouro_compiler.passes.remove_noops import remove_noops

NORMALIZE: tuple[Pass, ...] = (
    remove_noops,
    fold_constants,
    fold_delta_bias,
)
QUANTIZE: tuple[Pass, ...] = (
    insert_quantize_dequantize,  # needs the calibrated table, so the graph must be normalised
    fuse_dequantize_epilogue,  # reads what the pass before it wrote
)
PIPELINE: tuple[Pass, ...] = NORMALIZE + QUANTIZE
