"""Known functions, replaced by name in every module for the time of a capture.

A pybind extension or an autograd.Function breaks a graph; a scan written as a loop becomes
thousands of nodes. Replaced, each is one op, whether the real extensions are there or not.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from ouro_compiler.frontend.standins.layouts import cross_merge, cross_scan, join_windows
from ouro_compiler.frontend.standins.norms import add_norm
from ouro_compiler.frontend.standins.operators import associative_scan
from ouro_compiler.frontend.standins.refusals import refuse
from ouro_compiler.frontend.standins.scans import causal_conv, mixer, scan


@dataclass(frozen=True, kw_only=True)
class Replacement:
    """How a public function is recognised, beside its name, and what takes its place.

    compute takes keyword arguments, by the public function's parameter names after `renamed`.
    needed: parameters that it must have. ignored: those that do not change the result. All others
    are refused when they are given. fixed: arguments that its name implies. home: words one of
    which its module's name must contain.
    """

    compute: Callable[..., Any]
    needed: frozenset[str]
    ignored: frozenset[str] = frozenset()
    renamed: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    home: tuple[str, ...] = ()

    def fits(self, original: FunctionType) -> bool:
        """Does a function of the right name have the parameters and the home of the known one?"""
        at_home = not self.home or any(word in original.__module__ for word in self.home)
        return at_home and self.needed <= set(inspect.signature(original).parameters)


_SCAN = Replacement(
    compute=scan,
    needed=frozenset(["u", "delta", "A", "B", "C"]),
    ignored=frozenset(["backend", "nrows", "args", "kwargs"]),
)
_SCAN_EASY = Replacement(
    compute=scan,
    needed=frozenset(["us", "dts", "As", "Bs", "Cs"]),
    ignored=frozenset(["chunksize"]),
    renamed={"us": "u", "dts": "delta", "As": "A", "Bs": "B", "Cs": "C", "Ds": "D"},
)
_MIXER = Replacement(
    compute=mixer,
    needed=frozenset(
        ["xz", "conv1d_weight", "conv1d_bias", "x_proj_weight", "delta_proj_weight", "A"]
    ),
    ignored=frozenset(["checkpoint_lvl"]),
)
_CONV = Replacement(compute=causal_conv, needed=frozenset(["x", "weight", "bias", "activation"]))
_NORM = Replacement(
    compute=add_norm, needed=frozenset(["x", "weight", "bias", "residual", "prenorm"])
)
_CROSS_SCAN = Replacement(
    compute=cross_scan,
    needed=frozenset(["x", "in_channel_first", "out_channel_first"]),
    ignored=frozenset(["force_torch"]),
)
_CROSS_MERGE = Replacement(
    compute=cross_merge,
    needed=frozenset(["y", "in_channel_first", "out_channel_first"]),
    ignored=frozenset(["force_torch"]),
)
_WINDOWS = Replacement(
    compute=join_windows,
    needed=frozenset(["windows", "window_size", "H", "W"]),
    home=("mambavision", "mamba_vision"),  # Swin's function of this name has another layout
)
_ASSOCIATIVE_SCAN = Replacement(
    compute=associative_scan,
    needed=frozenset(["combine_fn", "xs", "dim", "reverse"]),
    ignored=frozenset(["combine_mode"]),
    home=("torch._higher_order_ops",),
)

KNOWN: dict[str, Replacement] = {
    **dict.fromkeys(("selective_scan_fn", "selective_scan_ref", "selective_scan_torch"), _SCAN),
    **dict.fromkeys(
        ("selective_scan_easy", "selective_scan_easyv2", "selective_scan_easyv3"), _SCAN_EASY
    ),
    **dict.fromkeys(
        (
            "mamba_inner_fn",
            "mamba_inner_ref",
            "mamba_inner_fn_no_out_proj",
            "bimamba_inner_fn",
            "bimamba_inner_ref",
        ),
        _MIXER,
    ),
    **dict.fromkeys(("causal_conv1d_fn", "causal_conv1d_ref"), _CONV),
    "layer_norm_fn": _NORM,
    "rms_norm_fn": Replacement(compute=add_norm, needed=_NORM.needed, fixed={"is_rms_norm": True}),
    "cross_scan_fn": _CROSS_SCAN,
    "cross_merge_fn": _CROSS_MERGE,
    "window_reverse": _WINDOWS,
    "associative_scan": _ASSOCIATIVE_SCAN,
}


@contextmanager
def replaced_functions(model: nn.Module | None = None) -> Iterator[list[str]]:
    """Replace the known functions in every loaded module, and in the model's attributes.

    Yields the replaced functions' full names. On leaving, every name is bound again to what it was.
    """
    replacements: dict[FunctionType, Callable[..., Any]] = {}
    changed: list[tuple[dict[str, Any], str, Any]] = []
    namespaces = [vars(module) for module in list(sys.modules.values()) if _has_names(module)]
    if model is not None:
        namespaces += [vars(module) for module in model.modules()]
    try:
        for namespace in namespaces:
            for name, value in list(namespace.items()):
                if not _is_known(value):
                    continue
                if value not in replacements:
                    replacements[value] = _stand_in_for(value)
                namespace[name] = replacements[value]
                changed.append((namespace, name, value))
        yield sorted({f"{one.__module__}.{one.__name__}" for one in replacements})
    finally:
        for namespace, name, value in changed:
            namespace[name] = value


def _has_names(module: Any) -> bool:
    return isinstance(getattr(module, "__dict__", None), dict)


def _is_known(value: Any) -> bool:
    if type(value) is not FunctionType or value.__name__ not in KNOWN:  # asks no proxy its class
        return False
    if (value.__module__ or "").partition(".")[0] == "ouro_compiler":
        return False
    return KNOWN[value.__name__].fits(value)


def _stand_in_for(original: FunctionType) -> Callable[..., Any]:
    """The replacement, with the original's own signature."""
    signature = inspect.signature(original)
    known = KNOWN[original.__name__]
    used = set(inspect.signature(known.compute).parameters)

    @functools.wraps(original)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = dict(known.fixed)
        for parameter, value in bound.arguments.items():
            name = known.renamed.get(parameter, parameter)
            if name in used:
                given[name] = value
            elif name not in known.ignored and _is_given(value, signature.parameters[parameter]):
                refuse(original.__name__, f"{parameter} is not supported")
        return known.compute(**given)

    return replaced


def _is_given(value: Any, parameter: inspect.Parameter) -> bool:
    """Is an argument something else than its default, None, False, zero or nothing?"""
    if value is parameter.default:
        return False
    return isinstance(value, Tensor) or bool(value)
