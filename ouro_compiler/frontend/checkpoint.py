"""Checkpoint: a model file -> a module in eval mode, with the preprocessing that it expects.

What a file is, is told by its content. Nothing in it is executed unless the caller allows pickle:
see `formats`, and `ouro_compiler.archive` for files of torch.export.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ouro_compiler.config import Preprocessing
from ouro_compiler.errors import ModelError, UsageError
from ouro_compiler.frontend.detect import (
    ARCHITECTURES,
    check_state,
    detect,
    with_current_names,
)
from ouro_compiler.frontend.formats import file_kind, read_safetensors, read_torch, unwrap
from ouro_compiler.frontend.preprocessing import (
    default_preprocessing,
    expected_preprocessing,
    find_preprocessing,
)

# Narrower ones mean nothing without the scales that come with them.
_WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model read from a file.

    module: in eval mode, in fp32, no parameter asks for gradients. name: a key of ARCHITECTURES,
    "vim" or "vmamba" for one of other shapes, or the file's stem where it holds a whole model.
    example: (2, C, H, W) fp32, the same each time.
    """

    module: nn.Module | torch.export.ExportedProgram
    name: str
    preprocessing: Preprocessing
    example: Tensor


def load_model(
    path: Path, *, arch: str | None = None, ema: bool = False, allow_pickle: bool = False
) -> LoadedModel:
    """Read a state_dict (safetensors, torch.save), a torch.export file or a pickled module.

    arch: a key of ARCHITECTURES for a state_dict whose shapes fit more than one; it wins over the
    file's metadata. ema: take the average of the weights that a training checkpoint holds beside
    them. allow_pickle: a file that needs it is unpickled in full, which runs any code
    that its author put there; modules need it.
    Raises UsageError for an unknown `arch`, one that is needed, or one given with a whole model;
    ModelError for a file that is missing, damaged, unsafe or compiled already, for a model that is
    not supported, and for weights that do not fit together or are not finite.
    """
    path = Path(path)
    if arch is not None and arch not in ARCHITECTURES:
        raise UsageError(f"there is no architecture {arch!r}; known are {_known()}")
    content: object = None
    with _naming(path):
        kind = file_kind(path)
        if ema and kind != "torch":
            raise ModelError("it holds no average of weights: only training checkpoints do")
        if kind == "safetensors":
            return _load_state(path, *read_safetensors(path), arch)
        if kind == "torch":
            content = read_torch(path, allow_pickle=allow_pickle)
            if not isinstance(content, nn.Module):
                return _load_state(path, unwrap(content, ema=ema), {}, arch)
    if arch is not None:
        raise UsageError(f"{path} holds a whole model, so no architecture can be given for it")
    return _load_module(path, content) if isinstance(content, nn.Module) else _load_exported(path)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors inside speak of "it"; outside they say which file that is."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"cannot open {path}: {error}") from error


def _known() -> str:
    return ", ".join(ARCHITECTURES)


def _load_state(
    path: Path, state: dict[str, Tensor], metadata: Mapping[str, str], arch: str | None
) -> LoadedModel:
    named = metadata.get("architecture")
    if named is not None and named not in ARCHITECTURES:
        raise ModelError(f"it names an unknown architecture {named!r}; known are {_known()}")
    if not state:
        raise ModelError("it holds no tensors")
    for key, tensor in state.items():
        _check_plain(key, tensor)
    state = with_current_names(state)
    name, config = detect(state, arch=arch or named)
    preprocessing = find_preprocessing(path, metadata, expected_preprocessing(config))
    with torch.device("meta"):  # the weights come from the file: no memory, no random numbers
        module = config.build()
    check_state(state, module, name)
    # Popped, so that a large model is not in memory twice.
    weights = {key: _own(state.pop(key)) for key in list(state)}
    module.load_state_dict(weights, strict=True, assign=True)
    check_finite(weights.items())
    return loaded_model(module.eval().requires_grad_(False), name, preprocessing)


def _load_exported(path: Path) -> LoadedModel:
    from ouro_compiler.archive import read_archive

    program, manifest = read_archive(path)
    with _naming(path):
        if manifest is not None:
            raise ModelError("it is compiled already; `ouro inspect` shows what is in it")
        preprocessing = default_preprocessing(*_exported_input(program))
        check_finite(program.state_dict.items())
    for parameter in program.parameters():
        parameter.requires_grad_(False)
    return loaded_model(program, path.stem, preprocessing)


def _load_module(path: Path, module: nn.Module) -> LoadedModel:
    module = module.eval().float().requires_grad_(False)
    with _naming(path):
        preprocessing = default_preprocessing(*module_input(module))
        check_finite(module.state_dict().items())
    return loaded_model(module, path.stem, preprocessing)


def loaded_model(
    module: nn.Module | torch.export.ExportedProgram, name: str, preprocessing: Preprocessing
) -> LoadedModel:
    """A LoadedModel with its example: two images of normal noise, the same each time."""
    shape = (2, preprocessing.channels, preprocessing.size, preprocessing.size)
    example = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return LoadedModel(module=module, name=name, preprocessing=preprocessing, example=example)


# Weights


def _check_plain(name: str, tensor: Tensor) -> None:
    """Refuse what no weight is, such as a small storage posing as a tensor of any shape."""
    if _counts_batches(name, tensor):
        return
    if tensor.dtype not in _WEIGHT_DTYPES or tensor.layout != torch.strided or tensor.is_meta:
        raise ModelError(
            f"tensor {name} is no dense tensor of floating-point numbers of 16 bits or more, but "
            f"{tensor.dtype}, {tensor.layout}, on {tensor.device}"
        )
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ModelError(f"tensor {name} has shape {tuple(tensor.shape)} but too little data")


def _counts_batches(name: str, tensor: Tensor) -> bool:
    """A batch norm's count of training batches: no weight, and yet in public checkpoints."""
    counts = name.endswith(".num_batches_tracked") and tensor.dtype == torch.int64
    return counts and tensor.dim() == 0 and not tensor.is_meta and not tensor.is_sparse


def _own(tensor: Tensor) -> Tensor:
    """A copy in fp32: how a format lays out, aligns or maps memory must not change results."""
    if tensor.dtype == torch.int64:
        return tensor.detach().clone()
    return tensor.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def check_finite(tensors: Iterable[tuple[str, Any]]) -> None:
    """Raises ModelError for the first tensor that holds NaN or infinite values."""
    for name, tensor in tensors:
        floating = isinstance(tensor, Tensor) and tensor.is_floating_point()
        if floating and not torch.isfinite(tensor.float()).all():
            raise ModelError(f"tensor {name} holds NaN or infinite values")


# The input of a whole model: (channels, side)


def _exported_input(program: torch.export.ExportedProgram) -> tuple[int, int]:
    names = program.graph_signature.user_inputs
    values = [
        node.meta.get("val")
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in names
    ]
    if len(values) != 1 or not isinstance(values[0], Tensor) or values[0].dim() != 4:
        raise ModelError("the exported model must take one tensor, images (B, C, H, W)")
    if values[0].dtype != torch.float32:
        raise ModelError(f"the exported model takes {values[0].dtype}; export it in torch.float32")
    channels, height, width = values[0].shape[1:]
    if not all(isinstance(side, int) for side in (channels, height, width)) or height != width:
        raise ModelError(
            "the exported model must take square images of one fixed size, not of shape "
            f"({channels}, {height}, {width})"
        )
    return channels, height


def module_input(module: nn.Module) -> tuple[int, int]:
    """(channels, side) from attributes that model code commonly has, else 3 and 224."""
    described = getattr(module, "default_cfg", None)
    shape = described.get("input_size") if isinstance(described, Mapping) else None
    if not isinstance(shape, (list, tuple)) or len(shape) != 3:
        shape = (3, 224, 224)
    holders = (getattr(module, "config", None), module)
    sizes = (getattr(holder, "img_size", None) for holder in holders)
    counts = (getattr(holder, "in_chans", None) for holder in holders)
    size: Any = next((size for size in sizes if size is not None), shape[1:])
    sides = list(size) if isinstance(size, (list, tuple)) else [size]
    positive = all(isinstance(side, int) and side > 0 for side in sides)
    if not positive or sides not in ([sides[0]], [sides[0]] * 2):
        raise ModelError(f"the model must take square images, but its input size is {size!r}")
    return next((count for count in counts if isinstance(count, int)), shape[0]), sides[0]
