"""Bring outlier channels into a trained model without changing what it computes.

    python -m scripts.inject_outliers examples/vim_digits.safetensors OUT.safetensors \\
        --images examples/digits_test.npz [--kind even|uneven] [--channels 4] [--factor 10]

Small models may lack the outliers of large ones. A channel's weight in a norm is multiplied by a
factor, and its columns in the linear behind the norm are divided by it: the logits stay what they
were, the activation between them has an outlier. Which channels: by the size of their values over
the tokens of some images, those that are alike everywhere (`even`: outliers of all tokens), or
those that stand out at a few tokens (`uneven`: outliers that come and go). Prints the largest
difference of the logits as a share of the largest logit, and refuses to write above 1e-5.

It cannot make outliers that move from channel to channel as they do in large trained models, and
it makes columns of weights small, which weights of 4 bits feel too.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ouro_compiler.frontend.checkpoint import LoadedModel, load_model
from ouro_compiler.frontend.detect import ARCHITECTURES

# A norm's place in its block, and those of the linears that read its output and nothing else does.
_READERS = {
    "norm": ("mixer.in_proj", "op.in_proj"),
    "norm1": ("mixer.in_proj", "mixer.qkv", "attn.qkv"),
    "norm2": ("mlp.fc1",),
}
KINDS = ("even", "uneven")
TOLERANCE = 1e-5


def norms_and_linears(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Linear]]:
    """(name, norm, linear) wherever a block's norm is read by one linear and nothing else."""
    for name, block in model.named_modules():
        for place, readers in _READERS.items():
            norm = getattr(block, place, None)
            weight = getattr(norm, "weight", None)
            if isinstance(norm, nn.BatchNorm2d) or not isinstance(weight, Tensor):
                continue
            for reader in readers:
                linear: Any = block
                for part in reader.split("."):
                    linear = getattr(linear, part, None)
                if isinstance(linear, nn.Linear) and linear.in_features == weight.numel():
                    yield f"{name}.{place}".lstrip("."), norm, linear
                    break


def inject_outliers(
    model: nn.Module, images: Tensor, *, kind: str, channels: int = 4, factor: float = 10.0
) -> nn.Module:
    """A copy with `channels` channels of every norm's output `factor` times as large.

    images (n, C, H, W): what the channels are chosen on.
    Raises ValueError for a model without such norms, or with fewer channels.
    """
    if kind not in KINDS or channels < 1 or not factor > 0:
        raise ValueError(f"kind is one of {', '.join(KINDS)}, channels >= 1 and factor > 0")
    found = copy.deepcopy(model).eval()
    pairs = list(norms_and_linears(found))
    if not pairs:
        raise ValueError(f"{type(model).__name__} has no norm with a linear behind it")
    chosen = _choose_channels(found, pairs, images, kind, channels)
    with torch.no_grad():
        for name, norm, linear in pairs:
            norm.weight[chosen[name]] *= factor
            bias = getattr(norm, "bias", None)
            if isinstance(bias, Tensor):
                bias[chosen[name]] *= factor
            linear.weight[:, chosen[name]] /= factor
    return found


def largest_difference(model: nn.Module, other: nn.Module, images: Tensor) -> float:
    """Of the logits, as a share of the largest one."""
    with torch.no_grad():
        ours, theirs = model(images), other(images)
    return float((ours - theirs).abs().max() / ours.abs().max())


def _choose_channels(
    model: nn.Module,
    pairs: list[tuple[str, nn.Module, nn.Linear]],
    images: Tensor,
    kind: str,
    count: int,
) -> dict[str, Tensor]:
    """Channels by norm: those whose size varies least, or most, over images and tokens."""
    spread: dict[str, Tensor] = {}

    def note(name: str, linear: nn.Module, inputs: tuple[Tensor]) -> None:
        size = inputs[0].detach().flatten(0, -2).abs()
        spread[name] = size.quantile(0.98, 0) / size.mean(0).clamp(min=1e-6)

    handles = [linear.register_forward_pre_hook(partial(note, name)) for name, _, linear in pairs]
    try:
        with torch.no_grad():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    for name, found in spread.items():
        if found.numel() < count:
            raise ValueError(f"{name} has {found.numel()} channels, {count} were asked for")
    return {
        name: found.topk(count, largest=kind == "uneven").indices for name, found in spread.items()
    }


def write_model(model: nn.Module, loaded: LoadedModel, path: Path) -> None:
    """Write the weights, with what the file that was loaded says of its model, all or nothing."""
    metadata = {"preprocessing": json.dumps(loaded.preprocessing.to_dict())}
    if loaded.name in ARCHITECTURES:  # else the weights themselves tell
        metadata["architecture"] = loaded.name
    partial_path = path.with_name(f"{path.name}.{os.getpid()}.partial")
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, partial_path, metadata=metadata)
    os.replace(partial_path, path)


def main() -> None:
    """Command line."""
    from ouro_compiler.data import open_images

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="a checkpoint of a family that is known")
    parser.add_argument("output", type=Path, help="the .safetensors to write")
    parser.add_argument("--images", type=Path, required=True, help="what channels are chosen on")
    parser.add_argument("--kind", choices=KINDS, default="even")
    parser.add_argument("--channels", type=int, default=4)
    parser.add_argument("--factor", type=float, default=10.0)
    given = parser.parse_args()
    loaded = load_model(given.model)
    assert isinstance(loaded.module, nn.Module)
    images = next(open_images(given.images, loaded.preprocessing).batches(128))
    made = inject_outliers(
        loaded.module, images, kind=given.kind, channels=given.channels, factor=given.factor
    )
    difference = largest_difference(loaded.module, made, images)
    print(f"largest difference of the logits: {difference:.1e} of the largest")
    if not difference <= TOLERANCE:  # NaN too
        raise SystemExit(f"it is above {TOLERANCE:g}: nothing was written")
    write_model(made, loaded, given.output)


if __name__ == "__main__":
    main()
