"""Capture: module or exported program -> fx.GraphModule in training IR, with a dynamic batch."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from torch import Tensor, fx, nn

from ouro_compiler.errors import ModelError, UsageError
from ouro_compiler.frontend.standins import replaced_functions

MAX_BATCH = 65_536


def capture(model: nn.Module | torch.export.ExportedProgram, example: Tensor) -> fx.GraphModule:
    """The graph of a model that takes one tensor, with its first dimension dynamic.

    example: (B, ...), any B >= 1 (a batch of 1 is doubled, since export would fix it). Parameters
    are get_attr nodes; nothing is decomposed, and nothing is written in place. Known scans, convs
    and norms of public code become ops (docs/standins.md). Raises ModelError if the model cannot be
    traced, UsageError if the example is not in fp32.
    """
    require_fp32(example)
    program = exported(model, example)
    if _writes_in_place(program.graph):
        program = program.run_decompositions({})  # functionalises; layers stay whole
    gm = program.module(check_guards=False)
    assert isinstance(gm, fx.GraphModule)
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    if len(placeholders) != 1:
        raise ModelError(
            f"the model takes {len(placeholders)} inputs; ouro compiles models of one image tensor"
        )
    return gm


def require_fp32(example: Tensor) -> None:
    """Raise UsageError for a model whose input is no fp32: it computes in something else."""
    if example.dtype != torch.float32:
        raise UsageError(
            f"ouro compiles fp32 models, and this one's input is {example.dtype}: "
            "call model.float() and pass fp32 images"
        )


def exported(
    model: nn.Module | torch.export.ExportedProgram, example: Tensor
) -> torch.export.ExportedProgram:
    """A model as `capture` traces it, for those who capture it several times. It shares weights."""
    if isinstance(model, torch.export.ExportedProgram):
        return model
    with _evaluating(model), replaced_functions(model):
        return export(model, example)


def export(
    module: nn.Module, example: Tensor, *, static: bool = False
) -> torch.export.ExportedProgram:
    """torch.export of a module in eval mode that takes one tensor, batch from 1 to MAX_BATCH.

    static: for batches of the example's size alone. Raises ModelError if it cannot be traced.
    """
    batch = example if static or example.shape[0] > 1 else torch.cat((example, example))
    dynamic = None if static else ({0: torch.export.Dim("batch", min=1, max=MAX_BATCH)},)
    try:
        # On failure torch prints the whole graph to stderr; the sentence below says what matters.
        with torch.no_grad(), _frozen(module), redirect_stderr(io.StringIO()):
            return torch.export.export(module, (batch,), dynamic_shapes=dynamic, strict=False)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        batches = f"a batch of {len(batch)}" if static else "a dynamic batch"
        raise ModelError(
            f"torch.export cannot trace {type(module).__name__} with {batches}: {reason}"
        ) from error


def _writes_in_place(graph: fx.Graph) -> bool:
    schemas = [getattr(node.target, "_schema", None) for node in graph.nodes]
    return any(schema is not None and schema.is_mutable for schema in schemas)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for the time of the capture."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """No parameter asks for gradients while export runs (autograd.Functions are then inlined)."""
    asking = [p for p in module.parameters() if p.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


def batch_dimension_is_dynamic(gm: fx.GraphModule) -> bool:
    """Is the first dimension of the graph's input symbolic, and fixed by nothing?"""
    placeholder: Any = next(node for node in gm.graph.nodes if node.op == "placeholder")
    size = placeholder.meta["val"].shape[0]
    return isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None
