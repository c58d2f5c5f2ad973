"""What launches must move and compute at least, and how long GPUs would take: estimates.

Bytes: every operand once, read or written, from the sizes of the launch's arguments; caches serve
what is read again, and the lists of outlier columns, which stay in them, count nothing. Operations
are counted from the formulae below, by template. A launch takes at least the longest of: its bytes
at the memory's rate, its products at the matrix units', its arithmetic, its exponentials, its steps
that follow each other; and BETWEEN_LAUNCHES. Not in it: products of outliers, addresses and
conversions, latency. No GPU has measured any of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ouro_compiler.kernels.grouping import split
from ouro_compiler.kernels.launch import Launch
from ouro_compiler.kernels.spec import Epilogue, Template

BETWEEN_LAUNCHES = 1.5e-6  # seconds between kernels of a CUDA graph: an assumption
CYCLES_A_TOKEN = 100  # of a scan that holds several tokens' operands: 60 to 120 instructions
CYCLES_A_TOKEN_ALONE = 200  # of one that holds one token's: 125 to 190, and some of their way
QUANTIZER_OPS = 24  # fp32 operations an element: compare, list, two divisions, clamp, round
NORM_OPS = 8
EPILOGUE_OPS = 6  # of an output: two scales, their sum, weight scale, bias, conversion
SCAN_OPS = 6  # of a state and step: decay * h + (delta u) * B, and its part of y


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """Published ceilings, dense: bytes, int8 and int4 operations a second; boost clock.

    int4: as int8 where there are no INT4 tensor cores. lanes: fp32 multiply-adds a multiprocessor
    and cycle; exponentials are 16.
    """

    memory: float
    int8: float
    int4: float
    multiprocessors: int
    clock: float
    lanes: int

    @property
    def fp32(self) -> float:
        """Operations a second; a multiply-add is two."""
        return 2 * self.lanes * self.multiprocessors * self.clock

    @property
    def exponentials(self) -> float:
        """Exponentials a second."""
        return 16 * self.multiprocessors * self.clock


GPUS: Mapping[str, Gpu] = {
    "H200": Gpu(
        memory=4.8e12, int8=1979e12, int4=1979e12, multiprocessors=132, clock=1.98e9, lanes=128
    ),
    "A100": Gpu(
        memory=2.039e12, int8=624e12, int4=1248e12, multiprocessors=108, clock=1.41e9, lanes=64
    ),
    "L4": Gpu(memory=0.3e12, int8=242e12, int4=485e12, multiprocessors=58, clock=2.04e9, lanes=128),
}


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a launch does: bytes, operations (a multiply-add is two), cycles of steps that wait."""

    bytes: int = 0
    int8: int = 0
    int4: int = 0
    fp32: int = 0
    exponentials: int = 0
    cycles: int = 0

    def __add__(self, other: Work) -> Work:
        """Both at once: they share everything but the cycles that they wait."""
        return Work(
            bytes=self.bytes + other.bytes,
            int8=self.int8 + other.int8,
            int4=self.int4 + other.int4,
            fp32=self.fp32 + other.fp32,
            exponentials=self.exponentials + other.exponentials,
            cycles=max(self.cycles, other.cycles),
        )

    def seconds(self, gpu: Gpu) -> float:
        """The shortest time of one launch of this work."""
        return BETWEEN_LAUNCHES + max(
            self.bytes / gpu.memory,
            self.int8 / gpu.int8 + self.int4 / gpu.int4,
            self.fp32 / gpu.fp32,
            self.exponentials / gpu.exponentials,
            self.cycles / gpu.clock,
        )


def work_of(launch: Launch) -> Work:
    """What a launch does, members of a group together."""
    total = Work()
    for member in split(launch):
        total += _work(member)
    return total


def _work(launch: Launch) -> Work:
    spec, tensors = launch.spec, [one for one in launch.args if isinstance(one, Tensor)]
    moved = sum(one.numel() * one.element_size() for one in tensors)
    if spec.template is Template.LINEAR:
        rows = launch.args[0].shape[0] * spec["LENGTH"]
        lists = launch.args[4]
        activations = len({*spec.epilogue} - {Epilogue.BIAS, Epilogue.RESIDUAL})
        products = 2 * rows * spec["COLUMNS"] * spec["OUTPUTS"]
        return Work(
            bytes=moved - lists.numel() * lists.element_size(),
            int8=products if spec["MATRIX_BITS"] == 8 else 0,
            int4=products if spec["MATRIX_BITS"] == 4 else 0,
            fp32=EPILOGUE_OPS * rows * spec["OUTPUTS"],
            exponentials=activations * rows * spec["OUTPUTS"],
        )
    if spec.template is Template.QUANTIZING_LINEAR:
        tokens = launch.args[0].shape[0] * spec["LENGTH"]
        again = -(-spec["OUTPUTS"] // spec["BLOCK_N"])  # programs that quantize the same rows
        return Work(
            bytes=moved,
            int8=2 * 2 * tokens * spec["COLUMNS"] * spec["OUTPUTS"],  # inliers, then outliers
            fp32=tokens
            * (EPILOGUE_OPS * spec["OUTPUTS"] + QUANTIZER_OPS * spec["COLUMNS"] * again),
        )
    elements = launch.args[0].numel()
    constants = dict(spec.constants)
    if "STATES" in constants:  # a scan
        states = elements * spec["STATES"]
        soft = 2 * elements if constants.get("DELTA_SOFTPLUS") else 0
        gate = elements if constants.get("HAS_Z") else 0
        whole = spec.template is Template.QUANTIZED_SCAN or constants.get("SPLIT") == 0
        tokens = spec["LENGTH"] if whole else spec["CHUNK"]
        alone = constants.get("STEPS", 1) == 1
        return Work(
            bytes=moved,
            fp32=SCAN_OPS * states,
            exponentials=states + soft + gate,
            cycles=tokens * (CYCLES_A_TOKEN_ALONE if alone else CYCLES_A_TOKEN),
        )
    taps = constants.get("TAPS", 0) + constants.get("TAPS_H", 0) * constants.get("TAPS_W", 0)
    operations = 2 * taps + NORM_OPS * ("RMS" in constants)
    if "INLIER_BITS" in constants:
        operations += QUANTIZER_OPS
    gates = constants.get("SILU", 0) + constants.get("HAS_Z", 0)
    return Work(bytes=moved, fp32=operations * elements, exponentials=gates * elements)
