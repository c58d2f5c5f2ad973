"""ONNX Runtime: the model exported with one ONNX `Scan` node for each selective scan."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan as scan_operator

from benchmarks.peers import Model, UnavailableError, plain_operators
from ouro_compiler.frontend.capture import export


def scan_as_operator(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    reverse: bool = False,
) -> Tensor:
    """`ouro::selective_scan` with torch's `scan` operator, which ONNX has too."""
    batch, channels, _ = u.shape
    step = delta if delta_bias is None else delta + delta_bias[:, None]
    if delta_softplus:
        step = F.softplus(step)
    B, C = (matrix[:, None] if matrix.dim() == 3 else matrix for matrix in (B, C))
    groups, states = B.shape[1], A.shape[1]
    grouped = (batch, groups, channels // groups)
    operands = [step.permute(2, 0, 1), (step * u).permute(2, 0, 1)]
    operands += [B.permute(3, 0, 1, 2), C.permute(3, 0, 1, 2)]
    if reverse:
        operands = [one.flip(0) for one in operands]

    def combine(h: Tensor, now: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        dt, dx, b, c = now
        kept = (torch.exp(dt[..., None] * A) * h).view(*grouped, states)
        h = kept + dx.view(*grouped, 1) * b[:, :, None]
        y = (h * c[:, :, None]).sum(-1).view(batch, channels)
        return h.view(batch, channels, states), y

    _, y = scan_operator(combine, u.new_zeros(batch, channels, states), tuple(operands))
    y = (y.flip(0) if reverse else y).permute(1, 2, 0)
    if D is not None:
        y = y + u * D[:, None]
    return y if z is None else y * F.silu(z)


def onnx_model(model: nn.Module, images: Tensor, scans: int) -> Any:
    """The ONNX model for this batch size. Raises UnavailableError without `scans` Scan nodes."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UnavailableError("onnx and onnxscript are not installed") from error
    with plain_operators(selective_scan=scan_as_operator):
        program = export(model, images, static=True)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.onnx.export(program, dynamo=True, verbose=False, optimize=False)
    assert exported is not None
    proto = exported.model_proto
    found = sum(node.op_type == "Scan" for node in proto.graph.node)
    if found != scans:
        raise UnavailableError(f"the ONNX graph has {found} Scan nodes, the model {scans} scans")
    return proto


def onnx_runtime(model: nn.Module, images: Tensor, scans: int) -> Model:
    """A session with every optimisation, on as many threads as torch has."""
    try:
        import onnxruntime
    except ImportError as error:
        raise UnavailableError("onnxruntime is not installed") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    # Its threads spin during a run, not after it, while others are measured.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    proto = onnx_model(model, images, scans)
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    name = session.get_inputs()[0].name
    return lambda given: torch.from_numpy(session.run(None, {name: given.numpy()})[0])
