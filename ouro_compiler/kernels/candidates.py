"""Which blocks, warps and stages a kernel may run with: only what cannot change a bit of a result.

- Products with integer outliers sum int32 codes, exactly: every block is free, and the epilogue is
  elementwise. With 16-bit outliers the listed columns of x are summed in floating point, BLOCK_O of
  those that a tile's rows list at a time: BLOCK_M and BLOCK_O decide what is summed together, and
  BLOCK_N and warps which matrix instruction sums it. BLOCK_K, of codes only, and stages stay free.
- Quantizers: the largest element of a row is exact, so warps are free. Where a norm is summed
  (add_norm_quantize) they are not.
- dequantize_dynamic_outlier and causal_conv1d are elementwise, or sum taps one after the other:
  blocks and warps are free.
- Scans are not here.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from math import log2

from ouro_compiler.kernels.blocks import next_power_of_2
from ouro_compiler.kernels.linear import product_tiles
from ouro_compiler.kernels.spec import KernelSpec, Template
from ouro_compiler.ops.quantize import KEEP_FLOAT_BITS

Choice = tuple[tuple[str, int], ...]  # names and values of what is free, sorted by name

OPTIONS = ("num_stages", "num_warps")  # in a choice beside constants
_WARPS = (1, 2, 4, 8)
_PRODUCT = {
    "BLOCK_M": (16, 32, 64, 128),
    "BLOCK_N": (16, 32, 64, 128, 256),
    "BLOCK_K": (32, 64, 128),
    "MATRIX_BITS": (8, 4),
    "num_stages": (2, 3, 4),
    "num_warps": (2, 4, 8),
}
_MATRIX = "MATRIX_BITS"
_NIBBLES = 4  # bits of a matrix instruction's factors, and of what it can multiply
_NIBBLES_A_STEP = 64  # of one matrix instruction
_WITH_NIBBLES = re.compile(r".* sm_(80|86|87|89)|interpreter")
_FREE_IN_FLOATS = ("BLOCK_K", "num_stages")
_QUANTIZER = {"num_warps": (*_WARPS, 16)}
_VALUES: Mapping[Template, Mapping[str, tuple[int, ...]]] = {
    Template.LINEAR: _PRODUCT,
    Template.QUANTIZE: _QUANTIZER,
    Template.CONV_QUANTIZE: _QUANTIZER,
    Template.GATE_SUM_QUANTIZE: _QUANTIZER,
    Template.DEQUANTIZE: {
        "BLOCK_M": (1, 2, 4, 8, 16, 32, 64, 128),
        "BLOCK_K": (16, 32, 64, 128, 256, 512),
        "num_warps": _WARPS,
    },
    Template.CONV: {
        "BLOCK_L": (4, 8, 16, 32, 64),
        "BLOCK_D": (16, 32, 64, 128, 256),
        "num_warps": _WARPS,
    },
}
TUNED = frozenset(_VALUES)
_MOST_WINDOWS = 255  # that a product's tile may meet: a byte counts them
_LATER = {"BLOCK_K", "num_stages", _MATRIX}  # of products: tried at the best tile


def as_choice(values: Mapping[str, int]) -> Choice:
    """A choice from values by name."""
    return tuple(sorted(values.items()))


def free_values(spec: KernelSpec) -> Mapping[str, tuple[int, ...]]:
    """What is free in a kernel of a group of one, and the values to try; nothing where none is."""
    found = _VALUES.get(spec.template, {})
    if spec.template is Template.LINEAR and spec["OUTLIER_BITS"] == KEEP_FLOAT_BITS:
        return {name: found[name] for name in _FREE_IN_FLOATS}
    if spec.template is Template.LINEAR and not _holds_nibbles(spec):
        return {name: values for name, values in found.items() if name != _MATRIX}
    return found


def known_values(template: Template) -> Mapping[str, tuple[int, ...]]:
    """What may be free in kernels of a template, and every value of it."""
    return _VALUES.get(template, {})


def offered_on(machine: str | None, choice: Choice) -> bool:
    """Is a candidate one on a machine, as tables name it ("NVIDIA L4 sm_89")?"""
    return dict(choice).get(_MATRIX) != _NIBBLES or bool(_WITH_NIBBLES.fullmatch(machine or ""))


def current_choice(spec: KernelSpec) -> Choice:
    """The values that a spec has of what is free."""
    return as_choice({name: value_of(spec, name) for name in free_values(spec)})


def value_of(spec: KernelSpec, name: str) -> int:
    """A constant of a spec, or one of its options."""
    return int(getattr(spec, name)) if name in OPTIONS else spec[name]


def is_candidate(spec: KernelSpec, choice: Choice) -> bool:
    """May a kernel with this spec by default run so?"""
    free, values = free_values(spec), dict(choice)
    return values.keys() == free.keys() and _fits(spec, values)


def candidates(spec: KernelSpec, best: Choice, rows: int) -> list[Choice]:
    """What to try, nearest to the default first, the default itself left out.

    best: the fastest so far. A product's tiles and warps come first, then its steps and stages at
    the best tile. rows: B * L; larger tiles are no use.
    """
    free, default = free_values(spec), dict(current_choice(spec))
    if not free:
        return []
    first = {name: values for name, values in free.items() if name not in _later(spec)}
    found = list(_nearest(default, first))
    if len(first) < len(free):
        second = {name: free[name] for name in free if name not in first}
        found += _nearest(dict(best), second, default)
    most = max(16, next_power_of_2(rows))
    useful = (
        as_choice(values)
        for values in found
        if _fits(spec, values) and values != default and values.get("BLOCK_M", 16) <= most
    )
    return list(dict.fromkeys(useful))


def _holds_nibbles(product: KernelSpec) -> bool:
    """Are all factors but outliers' codes nibbles, and enough of them for one instruction?"""
    return (
        bool(product["PACKED"])
        and product["INLIER_BITS"] <= _NIBBLES
        and product["COLUMNS"] >= _NIBBLES_A_STEP
    )


def _later(spec: KernelSpec) -> set[str]:
    return _LATER if spec.template is Template.LINEAR else set()


def _nearest(
    around: Mapping[str, int],
    varied: Mapping[str, Iterable[int]],
    start: Mapping[str, int] | None = None,
) -> Iterator[dict[str, int]]:
    """`around` with other values, by how many doublings they are from `start`."""
    every = [
        dict(zip(varied, values, strict=True)) for values in itertools.product(*varied.values())
    ]
    origin = start or around

    def doublings(values: Mapping[str, int]) -> float:
        return sum(abs(log2(value) - log2(origin[name])) for name, value in values.items())

    for values in sorted(every, key=doublings):
        yield {**around, **values}


def _fits(spec: KernelSpec, values: Mapping[str, int]) -> bool:
    """Is every value one to try, and are they together no waste for this kernel's shape?"""
    free = free_values(spec)
    if any(values[name] not in free[name] for name in free):
        return False
    return _RULES.get(spec.template, _quantizer_fits)(spec, values)


def _product_fits(spec: KernelSpec, values: Mapping[str, int]) -> bool:
    constants = {**dict(spec.constants), **values}
    stored = -(-spec["COLUMNS"] // 2) if spec["PACKED"] else spec["COLUMNS"]
    if constants["BLOCK_K"] > max(32, next_power_of_2(stored)):
        return False
    if constants["BLOCK_N"] > max(16, next_power_of_2(spec["OUTPUTS"])):
        return False
    if product_tiles(constants, 1).constants["BLOCK_R"] > _MOST_WINDOWS:
        return False
    if "num_warps" not in values:
        return True
    if all(values[name] == value_of(spec, name) for name in ("BLOCK_M", "BLOCK_N", "num_warps")):
        return True
    size = values["BLOCK_M"] * values["BLOCK_N"]
    if values["BLOCK_M"] > 16 * values["num_warps"]:  # rows of one instruction; with more, spills
        return False
    # 16 to 32 sums a lane, twice: more spill, fewer are worth it where tiles are few.
    return (256 if size <= 1024 else 512) <= size // values["num_warps"] <= 1024


def _tile_fits(rows: str, columns: str, width: str) -> Callable[..., bool]:
    def fits(spec: KernelSpec, values: Mapping[str, int]) -> bool:
        size = values[rows] * values[columns]
        if values[columns] > max(16, next_power_of_2(spec[width])):
            return False
        return 512 <= size <= 4096 and 128 <= size // values["num_warps"] <= 1024

    return fits


def _quantizer_fits(spec: KernelSpec, values: Mapping[str, int]) -> bool:
    """A lane has at least one channel and at most 32."""
    return 32 <= spec["BLOCK_K"] // values["num_warps"] <= 1024


_RULES: Mapping[Template, Callable[[KernelSpec, Mapping[str, int]], bool]] = {
    Template.LINEAR: _product_fits,
    Template.DEQUANTIZE: _tile_fits("BLOCK_M", "BLOCK_K", "COLUMNS"),
    Template.CONV: _tile_fits("BLOCK_L", "BLOCK_D", "CHANNELS"),
}
