"""Rules for single values in the JSON of a `.pt2`; `archive_gate` joins them into its grammar.

A rule refuses what could run code or touch files, and rebuilds what it accepts.
"""

from __future__ import annotations

import ast
import json
import keyword
import re
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch

import ouro_compiler.ops  # noqa: F401  (a target is checked against the registered ops)
from ouro_compiler.errors import ModelError

# A rule takes a value and where it stands, and returns what torch may see of it.
Rule = Callable[[Any, str], Any]

# Bytes an element, by the number torch._export.serde.schema gives a dtype.
ITEM_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 2, 7: 4, 8: 8, 9: 4, 10: 8, 11: 16, 12: 1, 13: 2}
ITEM_SIZES |= {28: 2, 29: 1, 30: 1, 31: 1, 32: 1, 33: 1, 34: 4, 35: 8}
STRIDED = 7

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PATH = re.compile(r"(?!__)[A-Za-z0-9_-]+(\.(?!__)[A-Za-z0-9_-]+)*")
_PLAIN = re.compile(r"[A-Za-z0-9_ .,:/+<=>-]*")
_SYMBOL = re.compile(r"(s|ps|u|zf|zuf)[0-9]{1,6}")
_OP = re.compile(r"torch\.ops\.(aten|ouro)\.([A-Za-z0-9_]+)\.([A-Za-z0-9_]+)")
_MAX_EXPRESSION = 8000  # characters; an honest one has tens, and hundreds in a guard

_SIZE_ARITHMETIC = re.compile(
    r"_operator\.(add|sub|mul|floordiv|mod|neg|pos|eq|ne|lt|le|gt|ge)"
    r"|torch\.sym_(max|min|int|float|not)|math\.trunc"
)
# Ops of aten that are private by name and yet what torch.export leaves of ordinary modules.
_PRIVATE_OPS = re.compile(
    r"_adaptive_avg_pool[23]d|_assert_async|_assert_scalar|_assert_tensor_metadata|_conj"
    r"|_convolution|_fft_[cr]2[cr]|_fused_rms_norm|_local_scalar_dense|_(log_|safe_)?softmax"
    r"|_native_batch_norm_legit(_no_training)?|_native_multi_head_attention|_prelu_kernel"
    r"|_scaled_dot_product_(efficient_attention|flash_attention(_for_cpu)?)|_shape_as_tensor"
    r"|_to_copy|_transformer_encoder_layer_fwd|_trilinear|_unsafe_view|_weight_norm(_interface)?"
    r"|_upsample_bi(cubic|linear)2d_aa|__(and|or|xor|lshift|rshift)__"
)
# String arguments of aten that pick a mode; the others name files, print or format.
_MODES = re.compile(
    r"approximate|assert_msg|equation|indexing|interpolation|mode|norm|ord|p|pad_mode|padding"
    r"|padding_side|reduce|rounding_mode|side"
)
_SYMPY_CALLS = re.compile(
    r"Integer|Add|Mul|Max|Min|Mod|PythonMod|FloorDiv|CeilDiv|CleanDiv|ceiling|floor|And|Or|Not"
    r"|Equality|Unequality|(Strict)?(Less|Greater)Than"
)
_ASSUMPTIONS = frozenset(("integer", "positive", "nonnegative", "nonzero", "real"))
_GUARD_NAMES = frozenset(("L", "max", "min", "size", "stride", "storage_offset"))
_GUARD_NODES = (
    *(ast.Expression, ast.BoolOp, ast.UnaryOp, ast.BinOp, ast.Compare, ast.Call, ast.Attribute),
    *(ast.Subscript, ast.Constant, ast.Name, ast.Load),
    *(ast.boolop, ast.unaryop, ast.operator, ast.cmpop),
)


def refuse(where: str, reason: str) -> NoReturn:
    """Raise the ModelError of a refusal: which part of the file, and why."""
    raise ModelError(f"{where.replace('.json.', '.json: ', 1)} {reason}")


def short(value: Any) -> str:
    """A value as an error shows it: a few dozen characters at most."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# Rules for single values.


def _is(kind: type, name: str) -> Rule:
    def check(value: Any, where: str) -> Any:
        if type(value) is not kind:
            refuse(where, f"is {short(value)} instead of {name}")
        return value

    return check


def matching(pattern: re.Pattern[str], what: str) -> Rule:
    """A rule for strings that match a pattern as a whole."""

    def check(value: Any, where: str) -> Any:
        if not isinstance(value, str) or not pattern.fullmatch(value):
            refuse(where, f"is {short(value)}, which is no {what}")
        return value

    return check


def one_of(allowed: Iterable[Any], what: str) -> Rule:
    """A rule for values out of a fixed set."""
    values = tuple(allowed)

    def check(value: Any, where: str) -> Any:
        if type(value) not in (int, str) or value not in values:
            refuse(where, f"is {short(value)}, which is no {what}")
        return value

    return check


def integer(value: Any, where: str) -> int:
    """A whole number; a boolean is none."""
    if type(value) is not int or not -(2**63) <= value < 2**63:
        refuse(where, f"is {short(value)} instead of a 64-bit integer")
    return int(value)


def size(value: Any, where: str) -> int:
    """A whole number that is not negative."""
    number = integer(value, where)
    if number < 0:
        refuse(where, f"is negative ({number})")
    return number


def real_number(value: Any, where: str) -> Any:
    """A number as JSON or torch's schema writes it."""
    if type(value) not in (int, float) and value not in ("Infinity", "-Infinity", "NaN"):
        refuse(where, f"is {short(value)} instead of a number")
    return value


def identifier(value: Any, where: str) -> str:
    """An identifier: torch pastes names into Python source, at load already."""
    if not isinstance(value, str) or not NAME.fullmatch(value) or keyword.iskeyword(value):
        refuse(where, f"is {short(value)}, which is no plain identifier")
    return value


boolean = _is(bool, "true or false")
text = _is(str, "a string")
plain_text = matching(_PLAIN, "plain word")
dotted_path = matching(_PATH, "dotted name of a weight")


def op_target(value: Any, where: str) -> str:
    """An overload of aten or ouro that touches no files, or arithmetic on sizes."""
    if isinstance(value, str) and _SIZE_ARITHMETIC.fullmatch(value):
        return value
    if isinstance(value, str) and value.startswith("torch.ops.higher_order."):
        refuse(where, f"is {short(value)}: export under torch.no_grad() and without control flow")
    match = _OP.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        refuse(where, f"is {short(value)}, which is no op of aten or ouro")
    namespace, name, overload = match.groups()
    op = getattr(getattr(getattr(torch.ops, namespace), name, None), overload, None)
    if not isinstance(op, torch._ops.OpOverload):
        refuse(where, f"is {value}, which this version of torch and ouro_compiler does not have")
    if namespace == "aten" and name.startswith("_") and not _PRIVATE_OPS.fullmatch(name):
        refuse(where, f"is {value}, an internal op of aten")
    for argument in op._schema.arguments if namespace == "aten" else ():
        if "str" in str(argument.type) and not _MODES.fullmatch(argument.name):
            refuse(where, f"is {value}, which takes a string ({argument.name}): it may use files")
    return str(value)


def check_symbolic(value: Any, where: str) -> str:
    """A symbolic size: integers, symbols, arithmetic and a short list of sympy functions.

    Returns the text written out again from its syntax tree, so that sympy's own tokenizer has
    nothing left to interpret. Raises ModelError for anything else.
    """
    tree = _parse(text(value, where), where)
    if not _is_symbolic(tree.body):
        refuse(where, f"is {short(value)}, which is no plain arithmetic on sizes")
    return ast.unparse(tree)


def _parse(text: str, where: str) -> ast.Expression:
    if len(text) > _MAX_EXPRESSION:
        refuse(where, f"is an expression of {len(text)} characters")
    try:
        return ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        refuse(where, f"is {short(text)}, which is no expression")


def _is_symbolic(node: ast.expr) -> bool:
    match node:
        case ast.Constant(value=int(value)):
            return not isinstance(value, bool) and value < 2**63
        case ast.Name(id=name):
            return _SYMBOL.fullmatch(name) is not None
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return _is_symbolic(operand)
        case ast.BinOp(
            left=left,
            op=ast.Add() | ast.Sub() | ast.Mult() | ast.FloorDiv() | ast.Mod(),
            right=right,
        ):
            return _is_symbolic(left) and _is_symbolic(right)
        case ast.Call(func=ast.Name(id="Symbol"), args=[ast.Constant(value=str(name))]):
            return _SYMBOL.fullmatch(name) is not None and all(map(_is_assumption, node.keywords))
        case ast.Call(
            func=ast.Name(id="Pow"),
            args=[
                base,
                ast.Call(func=ast.Name(id="Integer"), args=[ast.Constant(value=2 | 3 | 4)]),
            ],
            keywords=[],
        ):  # one small power: a tower of them would fill the memory
            return _is_symbolic(base) and "Pow" not in ast.dump(base)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]):
            return bool(_SYMPY_CALLS.fullmatch(name)) and all(map(_is_symbolic, args))
    return False


def _is_assumption(word: ast.keyword) -> bool:
    value = word.value
    return word.arg in _ASSUMPTIONS and isinstance(value, ast.Constant) and value.value in (0, 1)


def no_guards(value: Any, where: str) -> list[str]:
    """Honest guards compare sizes of inputs; they are dropped, since torch would exec them."""
    for index, guard in enumerate(list_of(text)(value, where)):
        for node in ast.walk(_parse(guard, f"{where}[{index}]")):
            used = getattr(node, "id", getattr(node, "attr", "L"))
            if not isinstance(node, _GUARD_NODES) or used not in _GUARD_NAMES:
                refuse(f"{where}[{index}]", f"is {short(guard)}: code that torch would run")
    return []


def tree_spec(value: Any, where: str) -> str:
    """The nesting of inputs or outputs: tuples, lists and dicts with plain keys."""
    outer = list_of(anything)(load_json(text(value, where), where), where)
    if len(outer) != 2 or outer[0] != 1:
        refuse(where, "is a tree spec of an unknown version")
    return json.dumps([1, _tree(outer[1], where)])


def _tree(value: Any, where: str) -> dict[str, Any]:
    spec = record({"type": anything, "context": anything, "children_spec": list_of(_tree)})(
        value, where
    )
    kind, context, children = spec["type"], spec["context"], spec["children_spec"]
    if kind is None and context is None and not children:
        return dict(spec)
    if kind in ("builtins.tuple", "builtins.list"):
        return {**spec, "context": "null"}
    if kind != "builtins.dict":
        refuse(where, f"nests inputs or outputs in {short(kind)}: use tuples, lists and dicts")
    keys = list_of(anything)(load_json(text(context, where), where), where)
    for key in keys:
        if type(key) is not int:
            identifier(key, where)
    return {**spec, "context": json.dumps(keys)}


# Rules for containers.


def anything(value: Any, where: str) -> Any:
    """No rule: only for what is never handed on as code."""
    return value


def dropped(replacement: Any) -> Rule:
    """Where torch parses what nobody needs here: descriptions of origin, mostly."""
    return lambda value, where: replacement


def refused(reason: str) -> Rule:
    """A rule that refuses whatever is there, with a reason."""
    return lambda value, where: refuse(where, reason)


def nullable(rule: Rule) -> Rule:
    """A rule, or null."""
    return lambda value, where: None if value is None else rule(value, where)


def list_of(rule: Rule) -> Rule:
    """A list of values under one rule."""

    def check(value: Any, where: str) -> list[Any]:
        found = _is(list, "a list")(value, where)
        return [rule(item, f"{where}[{index}]") for index, item in enumerate(found)]

    return check


def map_of(key: Rule, rule: Rule) -> Rule:
    """An object with keys and values under a rule each."""

    def check(value: Any, where: str) -> dict[str, Any]:
        found = _is(dict, "an object")(value, where)
        return {key(k, f"{where} key"): rule(v, f"{where}.{short(k)}") for k, v in found.items()}

    return check


def record(required: dict[str, Rule], optional: dict[str, Rule] | None = None) -> Rule:
    """An object of known keys; an unknown key may only be empty (a later torch's default)."""
    rules = {**required, **(optional or {})}

    def check(value: Any, where: str) -> dict[str, Any]:
        found = _is(dict, "an object")(value, where)
        for key in required.keys() - found.keys():
            refuse(where, f"lacks {key!r}")
        for key in found.keys() - rules.keys():
            if found[key]:
                refuse(where, f"has an unknown part {short(key)}")
        return {
            key: rules[key](item, f"{where}.{key}") for key, item in found.items() if key in rules
        }

    return check


def union(**cases: Rule) -> Rule:
    """An object with exactly one key, whose value is under that key's rule."""

    def check(value: Any, where: str) -> dict[str, Any]:
        found = _is(dict, "an object")(value, where)
        if len(found) != 1 or not found.keys() <= cases.keys():
            refuse(where, f"is {short(value)}, which is of no known kind")
        return {key: cases[key](item, f"{where}.{key}") for key, item in found.items()}

    return check


def load_json(text: bytes | str, where: str) -> Any:
    """Strict JSON in UTF-8. Raises ModelError."""
    try:
        decoded = text.decode() if isinstance(text, bytes) else text
        return json.loads(decoded, parse_constant=lambda name: refuse(where, f"holds {name}"))
    except (ValueError, RecursionError):
        refuse(where, "is damaged: it is no JSON text")
