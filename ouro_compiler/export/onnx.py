"""export_onnx: a graph of ours as a checked ONNX file, compared with ours in ONNX Runtime."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, fx

from ouro_compiler.errors import ModelError, UsageError, VerificationError
from ouro_compiler.evaluation import snr_db
from ouro_compiler.export.emitter import CONTRIB, ScanForm, static
from ouro_compiler.graph import value_of

if TYPE_CHECKING:
    from onnx import ModelProto

OPSETS = (18, 24)
FLOAT_TOLERANCE = 1e-3  # of the largest output
QUANTIZED_SNR = 20.0  # decibels
_CHECK_IMAGES = 3


@runtime_checkable
class Compiled(Protocol):
    """What is read of a CompiledModel."""

    graph_module: fx.GraphModule
    manifest: dict[str, Any]

    def __call__(self, images: Tensor) -> Tensor:
        """Its outputs."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written, and how far ONNX Runtime's outputs are from ours (None: not compared).

    nodes counts those of the graph with functions in place, without those in bodies of scans.
    difference is a share of the largest output; snr_db is infinite where nothing differs.
    """

    bytes: int
    opset: int
    nodes: int
    scans: int
    integer_products: int
    four_bit_weights: int
    difference: float | None
    snr_db: float | None


def export_onnx(
    model: Compiled | fx.GraphModule,
    path: str | PathLike[str],
    *,
    opset: int = 21,
    scan: ScanForm = "scan",
    verify: bool = True,
    images: Tensor | None = None,
) -> Exported:
    """Write an ONNX model of a compiled model, or of a captured and normalised graph.

    scan: one ONNX Scan a selective scan, or one com.microsoft LinearAttention (contrib). verify:
    compare with our outputs on images (B, C, H, W), by default noise of three images. The file
    appears when the model is valid. Raises UsageError for options, or where onnx is missing,
    ModelError for a model that has no ONNX form, and VerificationError where outputs differ.
    """
    check_options(opset, scan, verify)
    compiled = isinstance(model, Compiled)
    gm = model.graph_module if isinstance(model, Compiled) else model
    metadata = _metadata(model.manifest if isinstance(model, Compiled) else None, scan)
    from ouro_compiler.export.functions import flat_operators
    from ouro_compiler.export.model import to_onnx

    proto = to_onnx(gm, opset=opset, scan=scan, metadata=metadata)
    check_model(proto)
    content = proto.SerializeToString(deterministic=True)
    difference = snr = None
    if verify:
        batch = _noise(gm) if images is None else images
        with torch.no_grad():
            expected = _first(model(batch))
        difference, snr = compare(content, expected, batch)
        _judge(difference, snr, compiled)
    _write(Path(path), content)
    kinds = flat_operators(proto)
    return Exported(
        bytes=len(content),
        opset=opset,
        nodes=len(kinds),
        scans=kinds.count("Scan") + kinds.count("LinearAttention"),
        integer_products=kinds.count("MatMulInteger"),
        four_bit_weights=sum(one.data_type == 22 for one in proto.graph.initializer),  # INT4
        difference=difference,
        snr_db=snr,
    )


def check_options(opset: int, scan: str, verify: bool) -> None:
    """Raise UsageError for options that cannot end well here, before any work."""
    try:
        import onnx  # noqa: F401
    except ImportError:
        raise UsageError(
            "ONNX export needs the package onnx: install ouro-compiler[onnx]"
        ) from None
    if not OPSETS[0] <= opset <= OPSETS[1]:
        raise UsageError(f"--opset takes {OPSETS[0]} to {OPSETS[1]}, got {opset}")
    if scan not in ("scan", "contrib"):
        raise UsageError(f"--scan takes scan or contrib, got {scan}")
    if not verify and scan == "scan":
        return
    try:
        import onnxruntime
    except ImportError:
        raise UsageError(
            "verification needs the package onnxruntime: install ouro-compiler[onnx], or pass "
            "--no-verify"
        ) from None
    if scan == "contrib" and not has_linear_attention():
        raise UsageError(
            f"--scan contrib: this onnxruntime ({onnxruntime.__version__}) has no "
            "com.microsoft.LinearAttention with a decay for each key: leave the option out"
        )


def has_linear_attention() -> bool:
    """Does the installed ONNX Runtime have LinearAttention, with the gated rule and a decay?"""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    for schema in state.get_all_operator_schema():
        if schema.domain == CONTRIB and schema.name == "LinearAttention":
            named = {one.name for one in schema.inputs}
            return "decay" in named and "update_rule" in schema.attributes
    return False


def _metadata(manifest: dict[str, Any] | None, scan: str) -> dict[str, str]:
    from ouro_compiler import __version__

    found = {"ouro_version": __version__, "ouro_scan": scan}
    if manifest is not None:
        for key in ("config", "preprocessing"):
            found[f"ouro_{key}"] = json.dumps(manifest[key], sort_keys=True)
    return found


def check_model(proto: ModelProto) -> None:
    """onnx's checker and strict shape inference. Raises ModelError."""
    import onnx

    try:
        onnx.checker.check_model(proto, full_check=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"the exported ONNX model is invalid: {reason}") from error


def session(content: bytes, threads: int | None = None) -> Any:
    """An ONNX Runtime session on the CPU, on as many threads as torch has. Raises ModelError."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 3
    # Its threads spin during a run, not after it, while others work.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"onnxruntime does not load the exported model: {reason}") from error


def runner(content: bytes) -> Callable[[Tensor], Tensor]:
    """The first output of a session as a function of images, which raises VerificationError."""
    opened = session(content)
    name = opened.get_inputs()[0].name

    def run(given: Tensor) -> Tensor:
        try:
            return torch.from_numpy(opened.run(None, {name: given.numpy()})[0])
        except Exception as error:
            reason = str(error).strip().splitlines()[0]
            raise VerificationError(
                f"onnxruntime cannot run the exported model: {reason}"
            ) from error

    return run


def compare(content: bytes, expected: Tensor, images: Tensor) -> tuple[float, float]:
    """(largest difference as a share of the largest output, SNR in decibels) of ONNX Runtime.

    The images go through in one batch, then one alone, which must agree with its place in it.
    """
    run = runner(content)
    found = run(images)
    if found.shape != expected.shape:
        raise VerificationError(
            f"onnxruntime returns {tuple(found.shape)} where ours is {tuple(expected.shape)}"
        )
    alone = torch.cat([found[1:], run(images[:1])]) if len(images) > 1 else found
    reference = torch.cat([expected[1:], expected[:1]]) if len(images) > 1 else expected
    largest = max(float(expected.abs().max()), 1e-12)
    error = max(
        float((one - other).abs().max()) for one, other in ((found, expected), (alone, reference))
    )
    return error / largest, snr_db(reference, alone)


def _judge(difference: float, snr: float, compiled: bool) -> None:
    if compiled and not snr >= QUANTIZED_SNR:
        raise VerificationError(
            f"in onnxruntime the SNR of the outputs against ours is {snr:.1f} dB, "
            f"{QUANTIZED_SNR:g} are needed: no file was written"
        )
    if not compiled and not difference <= FLOAT_TOLERANCE:
        raise VerificationError(
            f"in onnxruntime outputs differ from ours by {difference:.2g} of the largest, "
            f"{FLOAT_TOLERANCE:g} is allowed: no file was written"
        )


def _noise(gm: fx.GraphModule) -> Tensor:
    placeholder = next(node for node in gm.graph.nodes if node.op == "placeholder")
    batch, *sizes = (static(one) for one in value_of(placeholder).shape)
    shape = [batch or _CHECK_IMAGES, *(int(one or 1) for one in sizes)]
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _first(outputs: Any) -> Tensor:
    return outputs if isinstance(outputs, Tensor) else outputs[0]


def _write(path: Path, content: bytes) -> None:
    partial = path.parent / f"{path.name}.{os.getpid()}.partial"
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UsageError(f"cannot write {path}: {error.strerror}") from error
