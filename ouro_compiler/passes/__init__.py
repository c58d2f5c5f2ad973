"""The pipeline: every pass in the order it runs, each position with its reason."""

from __future__ import annotations

from ouro_compiler.passes.base import Pass
from ouro_compiler.passes.cancel_slices import cancel_slices
from ouro_compiler.passes.concatenate_tokens import concatenate_tokens
from ouro_compiler.passes.fold_batch_norm import fold_batch_norm
from ouro_compiler.passes.fold_constants import fold_constants
from ouro_compiler.passes.fold_delta_bias import fold_delta_bias
from ouro_compiler.passes.fuse_conv_silu import fuse_conv_silu
from ouro_compiler.passes.fuse_cross_merge import fuse_cross_merge
from ouro_compiler.passes.fuse_delta_softplus import fuse_delta_softplus
from ouro_compiler.passes.fuse_dequantize_epilogue import fuse_dequantize_epilogue
from ouro_compiler.passes.fuse_dequantize_scan import fuse_dequantize_scan
from ouro_compiler.passes.fuse_direction_flips import fuse_direction_flips
from ouro_compiler.passes.fuse_quantize_prologue import fuse_quantize_prologue
from ouro_compiler.passes.insert_fake_quantize import insert_fake_quantize
from ouro_compiler.passes.insert_quantize_dequantize import insert_quantize_dequantize
from ouro_compiler.passes.narrow_activations import narrow_activations
from ouro_compiler.passes.normalize_linear import normalize_linear
from ouro_compiler.passes.quantize_heads import quantize_heads
from ouro_compiler.passes.quantize_recurrence import quantize_recurrence
from ouro_compiler.passes.raise_causal_conv1d import raise_causal_conv1d
from ouro_compiler.passes.raise_depthwise_conv import raise_depthwise_conv
from ouro_compiler.passes.raise_norm import raise_norm
from ouro_compiler.passes.raise_scan_operator import raise_scan_operator
from ouro_compiler.passes.raise_selective_scan import raise_selective_scan
from ouro_compiler.passes.read_maps_by_index import read_maps_by_index
from ouro_compiler.passes.remove_noops import remove_noops
from ouro_compiler.passes.share_views import share_views
from ouro_compiler.passes.split_scan_groups import split_scan_groups

NORMALIZE: tuple[Pass, ...] = (
    raise_scan_operator,  # before any other: the invariants hold from here on
    remove_noops,  # first: later patterns need not look through casts and dropout
    raise_selective_scan,  # before its unsqueezes and matmuls are rewritten as linears
    normalize_linear,  # before folding, while a layer's weight still has its own name
    split_scan_groups,  # after `view` became `reshape`: its results lie otherwise in memory
    cancel_slices,  # needs groups as concatenated linears and scans; leaves flips of directions
    fold_constants,  # reshaped weights and A = -exp(A_log) become constants
    fold_delta_bias,  # needs the linear behind delta
    raise_causal_conv1d,  # before flips: they turn its direction, not that of pad + conv + slice
    raise_depthwise_conv,  # what looks ahead too; after normalize_linear took one tap
    raise_norm,
    fuse_direction_flips,  # late: it walks through the ops that the passes above made
    concatenate_tokens,  # after flips, which go through concatenations of channels as they were
    share_views,  # last: views on either side of a dropped flip have become equal
)
INSERT: tuple[Pass, ...] = (
    insert_quantize_dequantize,  # needs the calibrated table, so the graph must be normalised
    insert_fake_quantize,  # the sites of simulated recipes; order between the two is free
    quantize_heads,  # anywhere: the plan has marked them
    quantize_recurrence,  # after both inserters: it takes scans with what they did to them
)
QUANTIZE: tuple[Pass, ...] = (
    *INSERT,  # from here on the graph computes in floating point what it will in integers
    fuse_conv_silu,  # after INSERT: recipes may quantize between the two
    fold_batch_norm,  # likewise; a weight of one scale loses what a norm did to single channels
    fuse_dequantize_epilogue,  # reads what the first pass wrote
    fuse_delta_softplus,  # needs the product behind delta
    fuse_quantize_prologue,  # which values must be emitted shows once no linear dequantizes
    fuse_cross_merge,  # needs norms with their quantizers
    fuse_dequantize_scan,  # after what takes gates out of plain scans
    read_maps_by_index,  # what else reads a copy is known
    narrow_activations,  # last: so is what else reads a product's result
)
PIPELINE: tuple[Pass, ...] = NORMALIZE + QUANTIZE
