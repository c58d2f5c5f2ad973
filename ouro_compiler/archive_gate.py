"""What the JSON inside a `.pt2` may say; everything else is refused before PyTorch reads it.

`torch.export.load` turns parts of that JSON into running code: symbolic strings through sympy's
eval, `guards_code` and every name (of inputs, values, weights) through generated Python that is
exec'ed, an enum in a tree spec through an import, a node's target through getattr on torch, and
ops such as `aten.from_file` through the file system. So the grammar below is closed: each string
has a rule, unknown content is an error, and the value handed on is rebuilt from what was checked.
Checked are the ways to run foreign code or touch files, not the numerics: running a graph is then
as safe as the argument checks of ATen and ouro.
"""

from __future__ import annotations

import re
from typing import Any

from ouro_compiler.archive_rules import (
    ITEM_SIZES,
    NAME,
    STRIDED,
    Rule,
    anything,
    boolean,
    check_symbolic,
    dotted_path,
    dropped,
    identifier,
    integer,
    list_of,
    load_json,
    map_of,
    matching,
    no_guards,
    nullable,
    one_of,
    op_target,
    plain_text,
    real_number,
    record,
    refuse,
    refused,
    short,
    size,
    text,
    tree_spec,
    union,
)

# The grammar, after torch._export.serde.schema.

_dtype = one_of(ITEM_SIZES, "data type that can be stored")
_device = record(
    {"type": one_of(("cpu", "cuda", "mps", "xpu"), "kind of device")}, {"index": nullable(size)}
)
_hint = nullable(union(as_int=integer, as_bool=boolean, as_float=real_number))
_expression = record({"expr_str": check_symbolic}, {"hint": _hint})
_sym_int = union(as_expr=_expression, as_int=integer)
_sym_float = union(as_expr=_expression, as_float=real_number)
_sym_bool = union(as_expr=_expression, as_bool=boolean)


def _tensor_meta(number: Rule, offset: Rule) -> Rule:
    return record(
        {
            "dtype": _dtype,
            "sizes": list_of(number),
            "requires_grad": boolean,
            "device": _device,
            "strides": list_of(number),
            "storage_offset": offset,
            "layout": one_of((STRIDED,), "dense layout"),
        }
    )


_tensor = record({"name": identifier})
_optional_tensor = union(as_tensor=_tensor, as_none=boolean)
_sym_int_argument = union(as_name=identifier, as_int=integer)
_sym_float_argument = union(as_name=identifier, as_float=real_number)
_sym_bool_argument = union(as_name=identifier, as_bool=boolean)
_object = refused("holds an object of a custom class, which would be unpickled")
_constants: dict[str, Rule] = {
    "as_none": boolean,
    "as_int": integer,
    "as_float": real_number,
    "as_bool": boolean,
}
_argument = union(
    **_constants,
    as_tensor=_tensor,
    as_tensors=list_of(_tensor),
    as_ints=list_of(integer),
    as_floats=list_of(real_number),
    as_string=text,  # repr'ed wherever torch writes it into source
    as_strings=list_of(text),
    as_sym_int=_sym_int_argument,
    as_sym_ints=list_of(_sym_int_argument),
    as_scalar_type=_dtype,
    as_memory_format=one_of(range(1, 5), "memory format"),
    as_layout=one_of(range(1, 8), "layout"),
    as_device=_device,
    as_bools=list_of(boolean),
    as_sym_bool=_sym_bool_argument,
    as_sym_bools=list_of(_sym_bool_argument),
    as_optional_tensors=list_of(_optional_tensor),
    as_optional_tensor=_optional_tensor,
    as_sym_float=_sym_float_argument,
    as_sym_floats=list_of(_sym_float_argument),
    as_complex=record({"real": real_number, "imag": real_number}),
    as_nested_tensors=list_of(list_of(_tensor)),
    as_graph=refused("holds a subgraph"),
    as_custom_obj=_object,
    as_operator=refused("passes an operator as an argument"),
)
# Not repr'ed where torch makes guards of it, so the quotes of an `as_string` would end the literal.
_input = union(**_constants, as_string=plain_text, as_tensor=_tensor, as_sym_int=_sym_int_argument)
_node = record(
    {
        "target": op_target,
        "inputs": list_of(
            record({"name": matching(NAME, "argument"), "arg": _argument}, {"kind": nullable(size)})
        ),
        "outputs": list_of(_argument),
        "metadata": dropped({}),
    },
    {"is_hop_single_tensor_return": nullable(boolean), "name": nullable(identifier)},
)
_graph = record(
    {
        "inputs": list_of(_input),
        "outputs": list_of(_argument),
        "nodes": list_of(_node),
        # torch does not read the offset of a value: a weight that was a view looks like its copy
        "tensor_values": map_of(identifier, _tensor_meta(_sym_int, dropped({"as_int": 0}))),
        "sym_int_values": map_of(identifier, _sym_int),
        "sym_bool_values": map_of(identifier, _sym_bool),
    },
    {
        "sym_float_values": map_of(identifier, _sym_float),
        "is_single_tensor_return": boolean,
        "custom_obj_values": map_of(identifier, _object),
    },
)
_held = {"arg": _tensor}
_signature = record(
    {
        "input_specs": list_of(
            union(
                user_input=record({"arg": _input}),
                parameter=record({**_held, "parameter_name": dotted_path}),
                buffer=record({**_held, "buffer_name": dotted_path, "persistent": boolean}),
                tensor_constant=record({**_held, "tensor_constant_name": dotted_path}),
                constant_input=record(
                    {"name": identifier, "value": union(**_constants, as_string=plain_text)}
                ),
                custom_obj=_object,
            )
        ),
        "output_specs": list_of(
            union(
                user_output=record({"arg": _argument}),
                buffer_mutation=record({**_held, "buffer_name": dotted_path}),
                parameter_mutation=record({**_held, "parameter_name": dotted_path}),
                user_input_mutation=record({**_held, "user_input_name": identifier}),
            )
        ),
    }
)
_call = record(
    {
        "inputs": dropped([]),
        "outputs": dropped([]),
        "in_spec": tree_spec,
        "out_spec": tree_spec,
    },
    {"forward_arg_names": nullable(list_of(identifier))},
)


def _root_call(value: Any, where: str) -> list[Any]:
    """Only the model's own call is kept: those of submodules serve torch.export.unflatten."""
    entries = list_of(anything)(value, where)
    roots = [item for item in entries if isinstance(item, dict) and item.get("fqn") == ""]
    if len(roots) != 1:
        refuse(where, f"describes {len(roots)} calls of the model instead of one")
    root = record({"fqn": text, "signature": _call})
    return [root(item, where) for item in roots]


def _range_name(value: Any, where: str) -> str:
    check_symbolic(value, where)
    return str(value)  # not rewritten: torch looks it up by this spelling


_model = record(
    {
        "graph_module": record(
            {"graph": _graph, "signature": _signature, "module_call_graph": _root_call},
            {"metadata": dropped({}), "treespec_namedtuple_fields": dropped({})},
        ),
        "opset_version": map_of(identifier, size),
        "range_constraints": map_of(
            _range_name, record({"min_val": nullable(integer), "max_val": nullable(integer)})
        ),
        "schema_version": record({"major": size, "minor": size}),
    },
    {
        "verifiers": list_of(one_of(("ATEN", "TRAINING"), "dialect of torch.export")),
        "torch_version": plain_text,
        "guards_code": no_guards,
    },
)


def _unpickled(value: Any, where: str) -> bool:
    if value is not False:
        refuse(where, f"is {short(value)}: the entry would be unpickled, which can run code")
    return False


def clean_model(text: bytes, where: str) -> dict[str, Any]:
    """The checked description of a program. Raises ModelError for what the grammar lacks."""
    return dict(_model(load_json(text, where), where))


def clean_payloads(text: bytes, where: str, prefix: str) -> dict[str, Any]:
    """The checked table {tensor name: its entry and layout}; entries are named `<prefix><number>`.

    Raises ModelError, above all where an entry would be unpickled.
    """
    entry = matching(re.compile(rf"{prefix}[0-9]{{1,9}}"), f"entry of raw tensor data {prefix}N")
    number = union(as_int=size)
    payload = record(
        {
            "use_pickle": _unpickled,
            "path_name": entry,
            "is_param": boolean,
            "tensor_meta": _tensor_meta(number, number),
        }
    )
    return dict(record({"config": map_of(dotted_path, payload)})(load_json(text, where), where))
