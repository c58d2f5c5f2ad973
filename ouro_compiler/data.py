"""Images from a folder or a file of arrays, and noise: batches that models take as they are."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ouro_compiler.config import Preprocessing
from ouro_compiler.errors import UsageError

if TYPE_CHECKING:
    from PIL import Image

_SUFFIXES = frozenset(
    ".jpg .jpeg .png .bmp .gif .webp .ppm .pgm .pbm .pnm .tif .tiff".split()  # noqa: SIM905
)
_LONGEST = 8  # how often the short side fits into the long one, at most, when resizing


class ImageData(ABC):
    """A fixed sequence of images. labels: (len,) int64 or None. description: without a path.

    class_names: of class folders, by label.
    """

    labels: Tensor | None
    description: str
    class_names: tuple[str, ...] | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _images(self, numbers: Sequence[int]) -> Iterator[Tensor]:
        """The images of these ascending numbers, (C, H, W) fp32, the same each time."""

    def batches(self, size: int, *, first: int = 0, step: int = 1) -> Iterator[Tensor]:
        """All images, in the same order each time, as (size, C, H, W) fp32; the last may be short.

        first, step: of these batches only number first, first + step, ...; the others are not read.
        One batch is in memory at a time (arrays of a file are there as a whole). Raises UsageError
        for size < 1 and, as batches are read, for an image file that cannot be decoded.
        """
        if size < 1:
            raise UsageError(f"a batch needs at least 1 image, got {size}")
        starts = range(first * size, len(self), step * size)
        return self._batches(size, [i for at in starts for i in range(at, at + size)])

    def _batches(self, size: int, numbers: Sequence[int]) -> Iterator[Tensor]:
        images = self._images([number for number in numbers if number < len(self)])
        while batch := list(islice(images, size)):
            yield torch.stack(batch)


def open_images(
    source: str | Path, preprocessing: Preprocessing, *, limit: int | None = None, seed: int = 0
) -> ImageData:
    """Images of a folder, or of the arrays in an .npz or .safetensors file.

    Folder: its sub-folders, sorted by name, are the classes 0, 1, ...; or it holds the images
    itself, and there are no labels. Files are decoded when their batch is read: the short side is
    resized to round(size / crop) pixels, the centre cut out, grey or RGB, normalised. `limit` keeps
    a random choice that depends on `seed` and the sorted names alone, in sorted order.
    Arrays: `images` (n, C, size, size) float32, normalised already, and if there are any `labels`,
    (n,) integers. `limit` keeps the first ones.
    Raises UsageError for a path or data that cannot be used.
    """
    path = Path(source)
    if limit is not None and limit < 1:
        raise UsageError(f"the limit on images must be at least 1, got {limit}")
    if os.path.isdir(path):
        return _Folder(path, preprocessing, limit, seed)
    if not os.path.exists(path):
        raise UsageError(f"there are no images at {path}: it does not exist")
    readers = {".npz": _read_npz, ".safetensors": _read_safetensors}
    if path.suffix.lower() not in readers:
        raise UsageError(f"{path} is no source of images: give a folder, .npz or .safetensors")
    return _Arrays(path, readers[path.suffix.lower()](path), preprocessing, limit)


def noise_images(preprocessing: Preprocessing, count: int, seed: int) -> ImageData:
    """`count` images of N(0, 1) noise in normalised space, the same however they are batched."""
    if count < 1:
        raise UsageError(f"noise needs at least 1 image, got {count}")
    return _Noise(preprocessing, count, seed)


def _counted(count: int, kind: str = "image") -> str:
    return f"{count} {kind}" if count == 1 else f"{count} {kind}s"


class _Noise(ImageData):
    labels = None

    def __init__(self, preprocessing: Preprocessing, count: int, seed: int) -> None:
        self._shape = (preprocessing.channels, preprocessing.size, preprocessing.size)
        self._count, self._seed = count, seed
        self.description = _counted(count, "noise image")

    def __len__(self) -> int:
        return self._count

    def _images(self, numbers: Sequence[int]) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(self._seed)
        wanted = set(numbers)
        for number in range(self._count):
            image = torch.randn(self._shape, generator=generator)
            if number in wanted:
                yield image


# Arrays


class _Arrays(ImageData):
    def __init__(
        self,
        path: Path,
        arrays: dict[str, Tensor],
        preprocessing: Preprocessing,
        limit: int | None,
    ) -> None:
        if "images" not in arrays:
            raise UsageError(f"{path} holds no array named images")
        images, labels = arrays["images"], arrays.get("labels")
        _check_images(path, images, preprocessing)
        if labels is not None:
            _check_labels(path, labels, images.shape[0])
            labels = labels[:limit].to(torch.int64)
        # A limited part is copied, so that the rest need not stay in memory.
        self._array = images if limit is None else images[:limit].clone()
        finite = [bool(torch.isfinite(image).all()) for image in self._array]
        if not all(finite):
            raise UsageError(f"image {finite.index(False)} of {path} holds NaN or infinite values")
        self.labels = labels
        self.description = f"{_counted(len(self))} of {_name(path)}"

    def __len__(self) -> int:
        return self._array.shape[0]

    def _images(self, numbers: Sequence[int]) -> Iterator[Tensor]:
        for number in numbers:
            yield self._array[number]


def _check_images(path: Path, images: Tensor, preprocessing: Preprocessing) -> None:
    side = preprocessing.size
    if images.dtype != torch.float32:
        raise UsageError(f"images of {path} must be float32, found {_dtype(images)}")
    if images.dim() != 4 or images.shape[1:] != (preprocessing.channels, side, side):
        raise UsageError(
            f"images of {path} must have shape (n, {preprocessing.channels}, {side}, {side}), "
            f"found {tuple(images.shape)}"
        )
    if images.shape[0] == 0:
        raise UsageError(f"{path} holds no images: its arrays are empty")


def _check_labels(path: Path, labels: Tensor, count: int) -> None:
    if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
        raise UsageError(f"labels of {path} must be integers, found {_dtype(labels)}")
    if labels.shape != (count,):
        raise UsageError(
            f"labels of {path} must have shape ({count},), found {tuple(labels.shape)}"
        )


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _read_npz(path: Path) -> dict[str, Tensor]:
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("it is one array, not an .npz archive")
        with archive as arrays:
            names = [name for name in ("images", "labels") if name in arrays.files]
            return {name: torch.from_numpy(arrays[name]) for name in names}
    except Exception as error:  # damaged bytes surface as nearly any exception
        raise UsageError(f"{path} cannot be read as arrays: {_reason(error)}") from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = [name for name in ("images", "labels") if name in file.keys()]  # noqa: SIM118
            if (file.metadata() or {}).get("labels") == "drawn at random":
                names = ["images"]  # of `ouro generate`: its labels are no ground truth
            return {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path} cannot be read as arrays: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _name(path: Path) -> str:
    return Path(os.path.abspath(path)).name  # "." and ".." have no name of their own


# Folders


class _Folder(ImageData):
    def __init__(
        self, folder: Path, preprocessing: Preprocessing, limit: int | None, seed: int
    ) -> None:
        try:
            files, labels, names = _list_folder(folder)
        except OSError as error:
            raise UsageError(f"{folder} cannot be listed: {error.strerror}") from error
        if not files:
            raise UsageError(f"there are no images in {folder}")
        if limit is not None and limit < len(files):
            order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed))
            kept = sorted(order[:limit].tolist())
            files = [files[index] for index in kept]
            labels = labels and [labels[index] for index in kept]
        self._files, self._preprocessing = files, preprocessing
        self.labels = torch.tensor(labels, dtype=torch.int64) if labels else None
        self.class_names = tuple(names) if labels else None
        self.description = f"{_counted(len(self))} of {_name(folder)}"

    def __len__(self) -> int:
        return len(self._files)

    def _images(self, numbers: Sequence[int]) -> Iterator[Tensor]:
        for number in numbers:
            yield _decode(self._files[number], self._preprocessing)


def _list_folder(folder: Path) -> tuple[list[Path], list[int] | None, list[str]]:
    """Image files in sorted order, the class of each unless the folder is flat, class names."""
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    flat = [entry for entry in entries if _is_image(entry)]
    files: list[Path] = []
    labels: list[int] = []
    classes = [entry for entry in entries if entry.is_dir()]
    for label, class_folder in enumerate(classes):
        found = _images_below(class_folder)
        files += found
        labels += [label] * len(found)
    if flat and files:
        raise UsageError(f"{folder} holds images both beside and inside its sub-folders: use one")
    return (flat, None, []) if flat else (files, labels, [entry.name for entry in classes])


def _images_below(folder: Path) -> list[Path]:
    found: list[Path] = []
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(root, name) for name in names if not name.startswith(".")]
    return sorted((path for path in found if _is_image(path)), key=lambda path: path.parts)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in _SUFFIXES and path.is_file()


def _decode(file: Path, preprocessing: Preprocessing) -> Tensor:
    """(C, size, size) fp32, normalised."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            pixels = np.asarray(_fit(_with_mode(image, preprocessing.channels), preprocessing))
    except Exception as error:  # each of pillow's decoders raises its own kinds
        raise UsageError(f"the image {file} cannot be read: {_reason(error)}") from error
    images = torch.from_numpy(pixels.astype(np.float32) / 255).reshape(*pixels.shape[:2], -1)
    return (images.permute(2, 0, 1) - _column(preprocessing.mean)) / _column(preprocessing.std)


def _column(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(-1, 1, 1)


def _with_mode(image: Image.Image, channels: int) -> Image.Image:
    """8-bit grey or RGB."""
    from PIL import Image

    if image.mode == "I" or image.mode.startswith("I;16"):  # 16 bits, which convert would clip
        scaled = np.asarray(image).astype(np.float32) / 257
        image = Image.fromarray(np.clip(np.rint(scaled), 0, 255).astype(np.uint8))
    if image.mode == "P":  # its colours may be transparent
        image = image.convert("RGBA")
    return image.convert("L" if channels == 1 else "RGB")


def _fit(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """Resize the short side, then cut out the centre."""
    from PIL import Image

    short = min(image.size)
    # A strip would grow to any size when its short side does: only its middle is ever seen.
    image = _cut_centre(image, *(min(side, _LONGEST * short) for side in image.size))
    scale = round(preprocessing.size / preprocessing.crop) / short
    width, height = (round(side * scale) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    return _cut_centre(image, preprocessing.size, preprocessing.size)


def _cut_centre(image: Image.Image, width: int, height: int) -> Image.Image:
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
