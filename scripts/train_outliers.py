"""Train a digits model on until its activations have outliers that move from token to token.

    python -m scripts.train_outliers examples/vim_digits.safetensors \\
        examples/vim_outliers.safetensors [--steps 600] [--weight 0.3]

Small trained models lack the outliers of large ones, and those that scripts/inject_outliers.py
brings in stay in their channels. Here a second loss asks of every linear in and out of a mixer
that each token have one channel far above the others, and that over all tokens every channel have
its turn. With p = softmax(4 |x| / rms(x)) over the channels of a token, these are a low entropy of
p and a high entropy of its mean: their difference is the mutual information of token and channel.
Labels are learned beside it, so accuracy stays what it can. Prints, before and after, accuracy on
the held-out images and, over all watched linears: the mean of max |x| / rms(x), and the share of
tokens whose largest channel is among the four that are largest most often (1: static outliers).
The weights written are the moving average after the last step. Needs `pip install mlxtend`.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ouro_compiler.kernels.cpu  # noqa: F401  (gradients of scans in C++)
from examples.train_digits import SEED, accuracy, augment, load_digits
from ouro_compiler.frontend.checkpoint import load_model
from scripts.inject_outliers import write_model

BATCH, RATE = 64, 1e-3
_SHARPNESS = 4.0
_OFTEN = 4  # channels
_WATCHED = ("in_proj", "out_proj", "qkv")


@contextmanager
def watched_inputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """A list to which every call of the model adds (tokens, channels), a tensor a linear."""
    found: list[Tensor] = []
    handles = [
        module.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].flatten(0, -2)))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in _WATCHED
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def relative_sizes(x: Tensor) -> Tensor:
    """|x| / rms(x) of each token: (tokens, channels)."""
    return x.abs() / (x.square().mean(1, keepdim=True) + 1e-6).sqrt()


def outlier_loss(x: Tensor) -> Tensor:
    """Of one linear's input (tokens, channels): 0 for one moving outlier a token, 1 for none."""
    p = torch.softmax(_SHARPNESS * relative_sizes(x), 1)
    of_tokens, of_all = _entropy(p).mean(), _entropy(p.mean(0))
    return 1 - (of_all - of_tokens) / math.log(x.shape[1])


def _entropy(p: Tensor) -> Tensor:
    return -(p * p.clamp(min=1e-12).log()).sum(-1)


def outlier_statistics(model: nn.Module, images: Tensor) -> tuple[float, float]:
    """Means over watched linears: max |x| / rms(x) of a token, and how static that channel is.

    Static: the share of tokens whose largest channel is among the four that are so most often.
    """
    with watched_inputs(model) as inputs, torch.no_grad():
        model(images)
    found = []
    for x in inputs:
        size, channel = relative_sizes(x).max(1)
        counts = torch.bincount(channel, minlength=x.shape[1])
        often = counts.topk(min(_OFTEN, len(counts))).values.sum() / counts.sum()
        found.append(torch.stack([size.mean(), often]))
    peak, share = torch.stack(found).mean(0).tolist()
    return peak, share


def describe(model: nn.Module, images: Tensor, labels: Tensor) -> str:
    """Accuracy, how far outliers stand out, and how static they are."""
    peak, share = outlier_statistics(model, images[:128])
    return (
        f"accuracy {100 * accuracy(model, images, labels):.1f} %, largest channel {peak:.2f} rms, "
        f"among the {_OFTEN} most frequent {100 * share:.0f} %"
    )


def train(model: nn.Module, steps: int, weight: float) -> nn.Module:
    """The moving average of the model, trained in place on labels and on `outlier_loss`."""
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    images, labels, test_images, test_labels = load_digits()
    print(f"before: {describe(model, test_images, test_labels)}", flush=True)
    model.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    smooth = torch.optim.swa_utils.get_ema_multi_avg_fn(0.98)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=smooth, use_buffers=True)
    start = time.perf_counter()
    for step in range(1, steps + 1):
        index = torch.randint(len(images), (BATCH,), generator=generator)
        with watched_inputs(model) as inputs:
            logits = model(augment(images[index], generator))
        wanted = torch.stack([outlier_loss(x) for x in inputs]).mean()
        loss = F.cross_entropy(logits, labels[index], label_smoothing=0.1)
        optimizer.zero_grad()
        (loss + weight * wanted).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(model)
        if step % 100 == 0:
            print(
                f"step {step}: labels {loss.item():.3f}, outliers {wanted.item():.3f}, "
                f"{time.perf_counter() - start:.0f} s",
                flush=True,
            )
    found: nn.Module = average.module.eval().requires_grad_(False)
    print(f"after: {describe(found, test_images, test_labels)}", flush=True)
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="a checkpoint that was trained on the digits")
    parser.add_argument("output", type=Path, help="the .safetensors to write")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--weight", type=float, default=0.3, help="of the second loss")
    given = parser.parse_args()
    loaded = load_model(given.model)
    assert isinstance(loaded.module, nn.Module)
    write_model(train(loaded.module, given.steps, given.weight), loaded, given.output)


if __name__ == "__main__":
    main()
