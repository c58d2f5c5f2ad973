"""A user's own model: `package.module:function`, keyword arguments, weights from a file.

The function is imported from Python's path, as `import` would do it; nothing is downloaded.
"""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ouro_compiler.config import Preprocessing
from ouro_compiler.errors import ModelError, UsageError
from ouro_compiler.frontend.checkpoint import (
    LoadedModel,
    check_finite,
    loaded_model,
    module_input,
)
from ouro_compiler.frontend.detect import check_state
from ouro_compiler.frontend.formats import file_kind, read_safetensors, read_torch, unwrap
from ouro_compiler.frontend.preprocessing import default_preprocessing

_SPEC = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def is_factory(source: str) -> bool:
    """Is this a factory, `package.module:function`, and no file's name?"""
    return _SPEC.fullmatch(source) is not None and not Path(source).exists()


def load_factory(
    source: str,
    *,
    arguments: Iterable[str] = (),
    checkpoint: Path | None = None,
    input_shape: str | None = None,
    allow_pickle: bool = False,
) -> LoadedModel:
    """Call a factory and make its module ready to compile: eval mode, fp32, no gradients.

    arguments: "name=value", where the value is a Python literal or else a string. checkpoint: a
    state_dict (safetensors or torch.save) that must fit strictly. input_shape: "CxHxW"; without it
    the module's own `default_cfg`, `img_size` and `in_chans` count, else 3x224x224.
    Raises UsageError for a factory or arguments that cannot be used, and ModelError for what the
    factory raises, for something that is no nn.Module, and for weights that do not fit.
    """
    function = _import(source)
    keywords = dict(_argument(one) for one in arguments)
    try:
        module = function(**keywords)
    except Exception as error:  # the user's own code
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ModelError(f"{source} failed ({type(error).__name__}: {reason})") from error
    if not isinstance(module, nn.Module):
        raise ModelError(f"{source} gave a {type(module).__name__}, not an nn.Module")
    if checkpoint is not None:
        _load_weights(module, checkpoint, allow_pickle)
    module = module.eval().float().requires_grad_(False)
    try:
        preprocessing = _preprocessing(module, input_shape)
        check_finite(module.state_dict().items())
    except ModelError as error:
        raise ModelError(f"cannot use {source}: {error}") from error
    return loaded_model(module, source.replace(":", ".").rpartition(".")[2], preprocessing)


def _import(source: str) -> Any:
    name, _, attribute = source.partition(":")
    try:
        found: Any = importlib.import_module(name)
    except Exception as error:  # a module's own code runs while it is imported
        raise UsageError(f"cannot import {name}: {error}; is it on PYTHONPATH?") from error
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise UsageError(f"{name} has no function {attribute}")
    return found


def _argument(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise UsageError(f"--model-arg takes name=value, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _load_weights(module: nn.Module, path: Path, allow_pickle: bool) -> None:
    try:
        state = _read_state(path, allow_pickle)
        check_state(state, module, "the model")
        check_finite(state.items())
    except ModelError as error:
        raise ModelError(f"cannot load {path}: {error}") from error
    module.load_state_dict(state, strict=True)


def _read_state(path: Path, allow_pickle: bool) -> dict[str, Tensor]:
    kind = file_kind(path)
    if kind == "safetensors":
        return read_safetensors(path)[0]
    if kind == "exported":
        raise ModelError("it is an exported program, not a state_dict")
    return unwrap(read_torch(path, allow_pickle=allow_pickle))


def _preprocessing(module: nn.Module, input_shape: str | None) -> Preprocessing:
    if input_shape is None:
        return default_preprocessing(*module_input(module))
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+)", input_shape)
    if match is None:
        raise UsageError(f"--input-shape takes CxHxW, such as 3x224x224, got {input_shape!r}")
    channels, height, width = map(int, match.groups())
    if height != width or height < 1:
        raise UsageError(f"images must be square, got --input-shape {input_shape}")
    return default_preprocessing(channels, height)
