"""Tensors out of training checkpoints, whose pickles hold other objects too, without their code.

A checkpoint carries its training arguments (argparse.Namespace, yacs CfgNode, numpy scalars). Every
class or function that it names beyond PyTorch's own list is replaced by one that does nothing.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch


class Inert:
    """In the place of any object of a pickle: takes whatever it is given, and keeps nothing."""

    def __new__(cls, *_args: Any, **_kwargs: Any) -> Inert:
        return object.__new__(cls)

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


# Classes whose pickles set items: PyTorch's reader allows that on an OrderedDict only.
_DICTIONARIES = ("CfgNode", "ConfigDict", "defaultdict", "EasyDict", "AttrDict")


def load_inert(path: Path) -> object:
    """What torch.save wrote, with `Inert` objects where it names classes that are not PyTorch's.

    Runs no code that the file names. Raises pickle.UnpicklingError where that cannot be read: the
    format before torch 1.6, or an object whose pickle needs its class.
    """
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except (ValueError, RuntimeError) as error:
        raise pickle.UnpicklingError(str(error)) from error
    stand_ins: list[Any] = [
        (OrderedDict if name.rpartition(".")[2] in _DICTIONARIES else Inert, name) for name in names
    ]
    with path.open("rb") as file, torch.serialization.safe_globals(stand_ins):
        return torch.load(file, map_location="cpu", weights_only=True)
