"""What the stand-ins do not do: training, and the states that recurrent inference keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from ouro_compiler.errors import UsageError


def refuse(name: str, what: str) -> NoReturn:
    """Raise UsageError: the function `name` is stood in for, without `what`."""
    raise UsageError(
        f"{name} is stood in for by ouro_compiler, for inference on whole sequences only: {what}"
    )


def refuse_training(name: str, *tensors: Tensor | None) -> None:
    """Raise UsageError if autograd would record a call with these tensors."""
    asking = any(tensor is not None and tensor.requires_grad for tensor in tensors)
    if asking and torch.is_grad_enabled():
        refuse(name, "a tensor asks for gradients; run the model under torch.no_grad()")


def refuse_given(name: str, **options: Any) -> None:
    """Raise UsageError if one of these options is given (anything but None or False)."""
    for option, value in options.items():
        if value is not None and value is not False:
            refuse(name, f"{option} is not supported")


def refusing(name: str, what: str) -> Callable[..., NoReturn]:
    """A function that cannot be stood in for: it refuses when it is called."""

    def refused(*_args: Any, **_kwargs: Any) -> NoReturn:
        refuse(name, what)

    refused.__name__ = name.rpartition(".")[2]
    return refused


class FinalState(Tensor):
    """The state that a scan's extension returns beside its output: it may be passed on, not used.

    Public code slices it always and uses it only for `return_last_state` and `inference_params`.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Slices and attributes work; anything that reads a value is refused."""
        if func is Tensor.__getitem__ or getattr(func, "__name__", "") == "__get__":
            return super().__torch_function__(func, types, args, kwargs or {})
        refuse("selective_scan", "its last state (return_last_state, inference_params) is not kept")


def final_state(u: Tensor, A: Tensor) -> Tensor:
    """A stand-in for the states (B, D, chunks, 2 N) of a scan; NaN where code is traced."""
    shape = (u.shape[0], u.shape[1], 1, 2 * A.shape[1])
    state = torch.full(shape, torch.nan, dtype=torch.float32, device=u.device)
    return state if torch.compiler.is_compiling() else state.as_subclass(FinalState)
