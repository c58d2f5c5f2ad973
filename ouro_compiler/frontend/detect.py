"""Which model a state_dict belongs to, told by the names and shapes of its tensors alone."""

from __future__ import annotations

import re
from collections import ChainMap
from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import Tensor, nn

from ouro_compiler.errors import ModelError, UsageError
from ouro_compiler.frontend.families import FAMILIES, Config, Family, shape_of

# Names of every family, as `--arch` and metadata use them; a ChainMap lists its last map first.
ARCHITECTURES: Mapping[str, Config] = ChainMap(*(f.architectures for f in reversed(FAMILIES)))

_SHOWN = 3  # how many of a long list of names a message shows
# The first VMamba checkpoints, before their code was reorganised.
_OLD_VMAMBA = (
    (re.compile(r"patch_embed\.proj\."), "patch_embed.0."),
    (re.compile(r"patch_embed\.norm\."), "patch_embed.2."),
    (re.compile(r"(layers\.\d+\.blocks\.\d+)\.ln_1\."), r"\1.norm."),
    (re.compile(r"(layers\.\d+\.blocks\.\d+)\.self_attention\."), r"\1.op."),
    (re.compile(r"(norm|head)\."), r"classifier.\1."),
)
_POINTWISE = re.compile(r"layers\..*\.(in_proj|out_proj|fc1|fc2|reduction)\.weight")


def detect(state: Mapping[str, Tensor], *, arch: str | None = None) -> tuple[str, Config]:
    """(name, architecture) of a state_dict; only names and shapes are read, meta tensors do.

    arch: a key of ARCHITECTURES that wins over what the shapes suggest (num_classes apart). Without
    it an architecture with the same shapes is looked up; one without a name is called "vim" or
    "vmamba". Shapes do not tell where a Vim's class token is nor whether its two directions are
    averaged, nor a VMamba's orders of scanning: every public checkpoint has what VimConfig and
    `models.vmamba` say. Raises UsageError where `arch` must choose between several, ModelError for
    another family, a missing tensor, or a shape that fits no model of the family. What is not
    needed here is left to `check_state`.
    """
    family = _family_of(state)
    if arch is not None and arch not in family.architectures:
        raise ModelError(f"these are weights of the {family.title} family, not of {arch}")
    num_classes, _ = shape_of(state, family.head, 2, family.title)
    if arch is None:
        inferred = family.infer(state, num_classes)
        arch = _named(family, inferred)
        if arch is None:
            return family.title.lower(), inferred
    return arch, replace(ARCHITECTURES[arch], num_classes=num_classes)


def _named(family: Family, inferred: Config) -> str | None:
    """The name of the one architecture that shapes fit; None where they may go without."""
    told = family.told(inferred)
    fitting = [name for name, known in family.architectures.items() if family.told(known) == told]
    if len(fitting) > 1:
        raise UsageError(
            f"these weights fit {' and '.join(fitting)}, which their shapes do not tell apart; "
            "choose one with --arch"
        )
    if not fitting and family.untold:
        raise ModelError(
            f"these are weights of a {family.title} of no known size, and shapes do not tell "
            f"{family.untold}; known are {', '.join(family.architectures)}"
        )
    return fitting[0] if fitting else None


def _family_of(state: Mapping[str, Tensor]) -> Family:
    for family in FAMILIES:
        if any(family.mark.match(key) for key in state):
            return family
    *titles, last = (family.title for family in FAMILIES)
    raise ModelError(
        f"these are not the weights of a {', '.join(titles)} or {last}: no tensor is named like "
        f"{FAMILIES[0].sample}, found {_first(state)}"
    )


def with_current_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under the names that `models` uses, as the first VMambas have others.

    VMamba's linears stored as 1x1 convolutions, (O, I, 1, 1), become (O, I).
    """
    if not any(re.match(r"layers\.\d+\.blocks\.\d+\.(op|self_attention)\.", key) for key in state):
        return dict(state)
    return {_current_name(key): _as_matrix(key, tensor) for key, tensor in state.items()}


def _current_name(key: str) -> str:
    for pattern, name in _OLD_VMAMBA:
        found, count = pattern.subn(name, key, count=1) if pattern.match(key) else (key, 0)
        if count:
            return found
    return key


def _as_matrix(key: str, tensor: Tensor) -> Tensor:
    pointwise = tensor.dim() == 4 and tensor.shape[2:] == (1, 1) and _POINTWISE.match(key)
    return tensor.flatten(1) if pointwise else tensor


def check_state(state: Mapping[str, Tensor], module: nn.Module, name: str) -> None:
    """Raises ModelError unless the tensors have the names and shapes that `module` has.

    name: what the message calls the module's architecture.
    """
    expected = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    for key, tensor in state.items():
        found = tuple(tensor.shape)
        if key in expected and found != expected[key]:
            raise ModelError(f"tensor {key} has shape {found}, but {name} expects {expected[key]}")
    missing = [key for key in expected if key not in state]
    if missing:
        raise ModelError(f"{name} needs tensors that are missing: {_first(missing)}")
    unexpected = [key for key in state if key not in expected]
    if unexpected:
        raise ModelError(f"there are tensors that {name} does not have: {_first(unexpected)}")


def _first(names: Iterable[str]) -> str:
    names = list(names)
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + rest
