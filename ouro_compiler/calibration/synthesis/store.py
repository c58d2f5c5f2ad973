"""Synthesised images on disk: batches that are finished, and batches that were interrupted.

Every set of images has its own folder, named by a digest of all that the images depend on. Files
are safetensors with a digest of their content: nothing is unpickled, and what is damaged, or was
written for something else, is made again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ouro_compiler.calibration.synthesis.loop import CURVE, Batch, Synthesizer
from ouro_compiler.calibration.synthesis.objectives import OutputLoss
from ouro_compiler.calibration.tensor_store import TensorStore, constants_of, tensors_digest

FORMAT_VERSION = 1


class Store:
    """The batches of one set of images. Where the disk fails, images are made and not kept."""

    def __init__(self, folder: Path, key: str) -> None:
        self.tensors = TensorStore(folder, key, "synthesised images")

    def load(self, index: int, numbers: Sequence[int], synthesizer: Synthesizer) -> Batch | None:
        """A batch as it was kept, finished or not, if it is there, whole, and of these numbers."""
        tensors = self.tensors.load(_name(index))
        if tensors is None:
            return None
        batch = _batch(list(numbers), tensors, synthesizer)
        if batch is None:
            self.tensors.refuse(_name(index), "other images")
        return batch

    def save(self, index: int, batch: Batch, *, finished: bool) -> None:
        """Keep a batch; what an unfinished one needs to go on is left out of a finished one."""
        tensors = {
            "images": batch.images,
            "iteration": torch.tensor(batch.iteration),
            "curve": torch.tensor(batch.curve, dtype=torch.float64).view(-1, len(CURVE)),
        }
        if not finished:
            tensors |= {"first": batch.moments[0], "second": batch.moments[1]}
        self.tensors.save(_name(index), tensors)


def _name(index: int) -> str:
    return f"batch-{index:05d}"


def _batch(
    numbers: list[int], tensors: Mapping[str, Tensor], synthesizer: Synthesizer
) -> Batch | None:
    """Tensors of a file as a batch, None unless they are one of this synthesizer's."""
    side, channels = synthesizer.preprocessing.size, synthesizer.preprocessing.channels
    shape = (len(numbers), channels, side, side)
    iteration = tensors.get("iteration")
    if iteration is None or iteration.shape != () or iteration.dtype != torch.int64:
        return None
    done = int(iteration)
    expected = {"images": shape, "curve": (done, len(CURVE)), "iteration": ()}
    if done < synthesizer.iterations:
        expected |= {"first": shape, "second": shape}
    if {name: tuple(value.shape) for name, value in tensors.items()} != expected:
        return None
    if not 0 <= done <= synthesizer.iterations:
        return None
    if done == synthesizer.iterations:
        nothing = torch.zeros(())
        return Batch(numbers, tensors["images"], (nothing, nothing), done, _curve(tensors))
    images, first, second = (
        tensors[name].to(synthesizer.device) for name in ("images", "first", "second")
    )
    return Batch(numbers, images, (first, second), done, _curve(tensors))


def _curve(tensors: Mapping[str, Tensor]) -> list[tuple[float, ...]]:
    return [tuple(row) for row in tensors["curve"].tolist()]


# What images depend on


def open_store(folder: Path | None, synthesizer: Synthesizer) -> Store | None:
    """The store below `folder` for what a synthesizer makes; None where there is to be none."""
    loss = _identity(synthesizer.output_loss)
    if folder is None or loss is None:
        return None
    return Store(folder, synthesis_key(synthesizer, loss))


def synthesis_key(synthesizer: Synthesizer, loss: str) -> str:
    """A digest of the graph and its constants, the spec, the preprocessing, and the code at work.

    loss: what the output loss goes by.
    """
    gm = synthesizer.run.module
    assert isinstance(gm, torch.fx.GraphModule)
    settings = {
        "format": FORMAT_VERSION,
        "code": _code_digest(),
        "torch": torch.__version__,
        "device": synthesizer.device.type,
        "spec": synthesizer.spec.to_dict(),
        "preprocessing": synthesizer.preprocessing.to_dict(),
        "loss": loss,
        "graph": str(gm.graph),
        "constants": tensors_digest(constants_of(gm)),
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _identity(loss: OutputLoss) -> str | None:
    """What tells a loss from others of its kind; None where a setting of it is no plain value."""
    settings = vars(loss)
    plain = all(isinstance(value, (int, float, str, tuple)) for value in settings.values())
    return f"{type(loss).__module__}.{type(loss).__qualname__} {settings}" if plain else None


def _code_digest() -> str:
    """Of the code beside this file: images of another version are not taken for this one's."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
