"""CompiledModel: a quantized graph that runs, and the manifest that says what it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor, fx, nn

import ouro_compiler.kernels.cpu  # importing them registers the kernels for CPU and CUDA
import ouro_compiler.kernels.cuda  # noqa: F401
from ouro_compiler.config import Target
from ouro_compiler.errors import DeviceError, UsageError
from ouro_compiler.report_view import ReportView
from ouro_compiler.runtime.cpu_runner import CpuRunner
from ouro_compiler.runtime.cuda_runner import CudaRunner, device_of


class CompiledModel(nn.Module):
    """A compiled, quantized model: images (B, C, H, W) fp32 -> what the original model returns.

    Built by `ouro_compiler.compile` or `ouro_compiler.load`. cuda_graphs: on a GPU, batch sizes
    that come again run as CUDA graphs; set it to False where a framework has its own.
    """

    cuda_graphs: bool = True

    def __init__(self, program: torch.export.ExportedProgram, manifest: Mapping[str, Any]) -> None:
        super().__init__()
        self.program, self.manifest = program, dict(manifest)
        self.seconds: dict[str, float] = {}  # what compiling took, by stage; not stored
        self.full_report: dict[str, Any] = {}  # with times and the search for bits; not stored
        module = program.module(check_guards=False)
        assert isinstance(module, fx.GraphModule)
        self.graph_module = module
        self._runner: CpuRunner | CudaRunner | None = None

    def forward(self, images: Tensor) -> Tensor:
        """Run a batch. Raises UsageError if the images have another shape."""
        self._check(images)
        if images.device.type not in ("cpu", "cuda"):
            with torch.no_grad():
                return self.graph_module(images)
        runner = self._runner_for(images)
        if isinstance(runner, CudaRunner):
            return runner(images, graphs=self.cuda_graphs)
        return runner(images)

    def _check(self, images: Tensor) -> None:
        expected = list(self.manifest["input"]["shape"])
        if list(images.shape[1:]) != expected[1:] or images.dim() != len(expected):
            raise UsageError(
                f"this model was compiled for images of {_shown(expected)}, got "
                f"{_shown(images.shape)}: resize them, or compile for that resolution"
            )

    def _runner_for(self, images: Tensor) -> CpuRunner | CudaRunner:
        if images.dtype != torch.float32:
            raise UsageError(f"images are {images.dtype}: pass them as torch.float32")
        device = device_of(self.graph_module)
        if images.device != device:
            raise UsageError(f"images are on {images.device}, the model is on {device}: move one")
        if self._runner is None:
            self._runner = runner_of(self.graph_module)
        return self._runner

    def traced(self, images: Tensor, labels: Mapping[str, str] | None = None) -> Tensor:
        """Run a batch on the CPU; under `torch.profiler` every node is a range of its own.

        labels: what nodes are called there, by name. The outputs are those of a call.
        """
        if images.device.type != "cpu":
            raise DeviceError("nodes are traced on the cpu: pass images that are there")
        self._check(images)
        runner = self._runner_for(images)
        assert isinstance(runner, CpuRunner)  # the model is where the images are
        return runner.traced(images, labels or {})

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_runner": None}  # addresses mean nothing in a copy

    def _apply(self, *args: Any, **kwargs: Any) -> CompiledModel:
        self._runner = None  # its constants are copies, left where they were
        return super()._apply(*args, **kwargs)

    @property
    def report(self) -> ReportView:
        """What was quantized, what was not and why, sizes and accuracy (docs/report.md).

        A dictionary that also shows itself: `rich.print`, notebooks, `table("layers")`.
        """
        found = self.manifest["report"]
        if not isinstance(found, ReportView):
            found = self.manifest["report"] = ReportView(found)
        return found

    @property
    def target(self) -> Target:
        """The device it was compiled for: "cpu" or "cuda"."""
        return self.manifest["target"]

    def save(self, path: str | PathLike[str]) -> None:
        """Write one `.pt2` (docs/artifact_format.md). The same model gives the same bytes."""
        from ouro_compiler.runtime.artifact import save

        save(self, path)


def runner_of(gm: fx.GraphModule) -> CpuRunner | CudaRunner:
    """What runs a graph of one input on the device of its constants."""
    return CudaRunner(gm) if device_of(gm).type == "cuda" else CpuRunner(gm)


def _shown(shape: Sequence[int]) -> str:
    """(2, 3, 32, 32) -> 32x32, 3 channels."""
    if len(shape) != 4:
        return f"shape ({', '.join(['B', *map(str, shape[1:])])})"
    return f"{shape[2]}x{shape[3]}, {shape[1]} channels"


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, cpu by default. Raises DeviceError if this machine lacks it."""
    found = torch.device(device or "cpu")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise DeviceError("no CUDA device on this machine: use the cpu, or run where there is one")
    if found.type not in ("cpu", "cuda"):
        raise DeviceError(f"ouro runs on cpu and cuda, not on {found.type}")
    return found
