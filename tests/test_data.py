"""Images from folders, arrays and noise: what comes out, in which order, and what is refused."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from ouro_compiler import data
from ouro_compiler.config import Preprocessing
from ouro_compiler.data import ImageData, noise_images, open_images
from ouro_compiler.errors import UsageError

RGB = Preprocessing(size=8, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), crop=0.8)
GREY = Preprocessing(size=8, mean=(0.25,), std=(0.5,), crop=1.0)


def _pixels(seed: int, *shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def _picture(path: Path, seed: int = 0, size: tuple[int, int] = (12, 10)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(_pixels(seed, size[1], size[0], 3)).save(path)
    return path


def _class_folders(root: Path) -> Path:
    for seed, name in enumerate(["dog/1.png", "cat/b.png", "cat/a.png", "cat/more/c.png"]):
        _picture(root / name, seed)
    return root


def _all(images: ImageData, size: int = 3) -> Tensor:
    return torch.cat(list(images.batches(size)))


def _denormalise(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (preprocessing.mean, preprocessing.std))
    return images * std + mean


def _check(images: ImageData, count: int, preprocessing: Preprocessing) -> None:
    """What every source promises: shapes, dtype, order, any split into batches."""
    side = preprocessing.size
    whole = _all(images, 1000)
    assert len(images) == count
    assert whole.shape == (count, preprocessing.channels, side, side)
    assert whole.dtype == torch.float32
    for size in (1, 2, 3):
        batches = list(images.batches(size))
        assert all(len(batch) == size for batch in batches[:-1])
        assert torch.equal(torch.cat(batches), whole)
    if images.labels is not None:
        assert images.labels.dtype == torch.int64
        assert images.labels.shape == (count,)
    with pytest.raises(UsageError, match="at least 1 image"):
        images.batches(0)


def _refusal(source: Path, preprocessing: Preprocessing = GREY, **options: Any) -> str:
    with pytest.raises(UsageError) as caught:
        _all(open_images(source, preprocessing, **options))
    message = str(caught.value)
    assert source.name in message
    assert "\n" not in message
    return message


# Folders


def test_class_folders(tmp_path: Path) -> None:
    images = open_images(_class_folders(tmp_path / "val"), RGB)
    _check(images, 4, RGB)
    assert images.labels is not None
    assert images.labels.tolist() == [0, 0, 0, 1]  # cat before dog
    assert images.description == "4 images of val"
    alone = tmp_path / "alone"
    _picture(alone / "x.png", 2)  # the seed of cat/a.png
    assert torch.equal(_all(images)[:1], _all(open_images(alone, RGB)))


def test_images_beside_class_folders(tmp_path: Path) -> None:
    _class_folders(tmp_path)
    assert "both beside and inside" in _refusal(tmp_path / "cat", RGB)


def test_class_order_does_not_depend_on_listing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _class_folders(tmp_path)
    expected = open_images(folder, RGB)
    listed, walked = Path.iterdir, os.walk

    def reversed_walk(*args: Any) -> Iterable[tuple[Any, list[str], list[str]]]:
        return [(root, folders, names[::-1]) for root, folders, names in list(walked(*args))[::-1]]

    monkeypatch.setattr(Path, "iterdir", lambda path: iter(sorted(listed(path))[::-1]))
    monkeypatch.setattr(data.os, "walk", reversed_walk)  # type: ignore[attr-defined]
    found = open_images(folder, RGB)
    assert torch.equal(_all(found), _all(expected))
    assert found.labels is not None
    assert found.labels.tolist() == [0, 0, 0, 1]


def test_an_empty_class_keeps_its_number(tmp_path: Path) -> None:
    _picture(tmp_path / "c" / "1.png")
    (tmp_path / "b").mkdir()
    (tmp_path / ".cache").mkdir()
    _picture(tmp_path / "c" / ".hidden.png")
    images = open_images(tmp_path, RGB)
    assert images.labels is not None
    assert images.labels.tolist() == [1]


def test_a_flat_folder(tmp_path: Path) -> None:
    for seed, name in enumerate(["b.JPEG", "a.png", "c.bmp"]):
        _picture(tmp_path / "flat" / name, seed)
    (tmp_path / "flat" / "notes.txt").write_text("not an image")
    images = open_images(str(tmp_path / "flat"), RGB)
    _check(images, 3, RGB)
    assert images.labels is None
    assert images.description == "3 images of flat"
    assert "flat" in open_images(tmp_path / "flat" / "." / ".." / "flat", RGB).description


def test_the_name_of_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _picture(tmp_path / "here" / "1.png")
    monkeypatch.chdir(tmp_path / "here")
    assert open_images(".", RGB).description == "1 image of here"


def test_limit_is_a_seeded_choice(tmp_path: Path) -> None:
    for seed in range(8):
        _picture(tmp_path / str(seed % 2) / f"{seed}.png", seed)
    whole = open_images(tmp_path, GREY)
    everything, labels = _all(whole), whole.labels
    assert labels is not None
    chosen = []
    for seed in range(4):
        images = open_images(tmp_path, GREY, limit=3, seed=seed)
        _check(images, 3, GREY)
        again = open_images(tmp_path, GREY, limit=3, seed=seed)
        assert torch.equal(_all(images), _all(again))
        rows = [_row(everything, image) for image in _all(images)]
        assert rows == sorted(set(rows))
        assert images.labels is not None
        assert torch.equal(images.labels, labels[rows])
        assert images.description == f"3 images of {tmp_path.name}"
        chosen.append(tuple(rows))
    assert len(set(chosen)) > 1
    assert torch.equal(_all(open_images(tmp_path, GREY, limit=100, seed=5)), everything)


def _row(images: Tensor, image: Tensor) -> int:
    return next(row for row, other in enumerate(images) if torch.equal(other, image))


# Decoding


def test_resize_crop_and_normalise(tmp_path: Path) -> None:
    path = _picture(tmp_path / "x.png", size=(40, 20))
    with Image.open(path) as image:
        resized = image.resize((20, 10), Image.Resampling.BICUBIC)  # round(8 / 0.8) = 10
    expected = np.asarray(resized.crop((6, 1, 14, 9))).astype(np.float32) / 255
    mean, std = np.array(RGB.mean, np.float32), np.array(RGB.std, np.float32)
    expected = ((expected - mean) / std).transpose(2, 0, 1)
    np.testing.assert_array_equal(_all(open_images(tmp_path, RGB))[0].numpy(), expected)


@pytest.mark.parametrize(
    "size", [(8, 8), (1, 1), (3, 50), (50, 3), (9, 10), (1, 5000), (5000, 1), (300, 200)]
)
@pytest.mark.parametrize("preprocessing", [RGB, GREY])
def test_any_size(tmp_path: Path, size: tuple[int, int], preprocessing: Preprocessing) -> None:
    Image.new("RGB", size, (255, 255, 255)).save(tmp_path / "x.png")
    found = _denormalise(_all(open_images(tmp_path, preprocessing)), preprocessing)
    assert found.shape == (1, preprocessing.channels, 8, 8)
    torch.testing.assert_close(found, torch.ones_like(found))


def test_a_strip_does_not_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resizing the short side of 1 pixel to 10 must not make the long one 50,000."""
    Image.new("RGB", (5000, 1)).save(tmp_path / "x.png")
    sizes, resize = [], Image.Image.resize

    def watched(image: Image.Image, size: tuple[int, int], *args: Any) -> Image.Image:
        sizes.append(size)
        return resize(image, size, *args)

    monkeypatch.setattr(Image.Image, "resize", watched)
    _all(open_images(tmp_path, RGB))
    assert sizes == [(80, 10)]


def test_an_image_of_the_right_size_is_not_touched(tmp_path: Path) -> None:
    pixels = _pixels(0, 8, 8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    found = _denormalise(_all(open_images(tmp_path, GREY)), GREY)[0, 0]
    torch.testing.assert_close(found, torch.from_numpy(pixels.astype(np.float32) / 255))


@pytest.mark.parametrize(
    ("mode", "colour", "rgb"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 100, (100, 100, 100)),
        ("LA", (100, 30), (100, 100, 100)),
        ("P", 7, None),
        ("RGB", (10, 20, 30), (10, 20, 30)),
        ("RGBA", (10, 20, 30, 40), (10, 20, 30)),
        ("CMYK", (255, 0, 0, 0), (0, 255, 255)),
        ("I;16", 25700, (100, 100, 100)),
        ("I", 25700, (100, 100, 100)),
    ],
)
@pytest.mark.filterwarnings("error")
def test_any_mode(tmp_path: Path, mode: str, colour: Any, rgb: tuple[int, ...] | None) -> None:
    image = Image.new(mode, (9, 9), colour)
    if mode == "P":
        image.putpalette([0] * 21 + [1, 2, 3])
        image.info["transparency"] = bytes(range(9))
        rgb = (1, 2, 3)
    image.save(tmp_path / "x.tiff" if mode in ("CMYK", "I") else tmp_path / "x.png")
    found = _denormalise(_all(open_images(tmp_path, RGB)), RGB)[0, :, 4, 4] * 255
    torch.testing.assert_close(found, torch.tensor(rgb, dtype=torch.float32), atol=0.01, rtol=0)
    assert _all(open_images(tmp_path, GREY)).shape == (1, 1, 8, 8)


def test_images_are_decoded_when_their_batch_is_read(tmp_path: Path) -> None:
    _picture(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    images = open_images(tmp_path, RGB)
    batches = images.batches(1)
    assert next(batches).shape == (1, 3, 8, 8)
    with pytest.raises(UsageError, match=r"b\.png cannot be read"):
        next(batches)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_truncated_images(tmp_path: Path) -> None:
    for suffix in (".png", ".jpg", ".gif", ".bmp", ".tiff", ".webp", ".ppm"):
        folder = tmp_path / suffix[1:]
        path = _picture(folder / f"x{suffix}", size=(64, 64))
        content = path.read_bytes()
        for length in (0, 2, 20, len(content) // 2):
            path.write_bytes(content[:length])
            with pytest.raises(UsageError, match=f"x{suffix} cannot be read"):
                _all(open_images(folder, RGB))


def test_an_image_too_large_to_decode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _picture(tmp_path / "x.png", size=(64, 64))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert "decompression bomb" in _refusal(tmp_path, RGB)


# Arrays


def _write(path: Path, **arrays: Any) -> Path:
    if path.suffix == ".npz":
        np.savez_compressed(path, **arrays)
    else:
        save_file({name: torch.as_tensor(array) for name, array in arrays.items()}, path)
    return path


def _array(count: int = 5, side: int = 8) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).normal(size=(count, 1, side, side)).astype(np.float32)


FORMATS = pytest.mark.parametrize("name", ["x.npz", "x.safetensors", "X.NPZ"])


@FORMATS
def test_arrays(tmp_path: Path, name: str) -> None:
    values, labels = _array(), np.array([3, 1, 2, 0, 9], dtype=np.int16)
    path = tmp_path / name
    _write(tmp_path / name.lower(), images=values, labels=labels, other=np.ones(3)).rename(path)
    images = open_images(path, GREY)
    _check(images, 5, GREY)
    assert torch.equal(_all(images), torch.from_numpy(values))
    assert images.labels is not None
    assert images.labels.tolist() == [3, 1, 2, 0, 9]
    assert images.description == f"5 images of {name}"


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_limit_takes_the_first_arrays(tmp_path: Path, suffix: str) -> None:
    values = _array()
    path = _write(tmp_path / f"x{suffix}", images=values, labels=np.arange(5))
    for limit in (1, 3, 100):
        images = open_images(path, GREY, limit=limit, seed=4)
        kept = min(limit, 5)
        _check(images, kept, GREY)
        assert torch.equal(_all(images), torch.from_numpy(values[:kept]))
        assert images.labels is not None
        assert images.labels.tolist() == list(range(kept))
    assert open_images(path, GREY, limit=1).description == f"1 image of x{suffix}"


def test_batches_do_not_share_memory_with_the_source(tmp_path: Path) -> None:
    images = open_images(_write(tmp_path / "x.npz", images=_array()), GREY)
    before = _all(images)
    for batch in images.batches(2):
        batch.zero_()
    assert torch.equal(_all(images), before)
    assert images.labels is None


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"pixels": _array()}, "no array named images"),
        ({"images": _array().astype(np.float64)}, "must be float32, found float64"),
        ({"images": _pixels(0, 5, 1, 8, 8)}, "must be float32, found uint8"),
        ({"images": _array()[:, 0]}, "(n, 1, 8, 8), found (5, 8, 8)"),
        ({"images": _array(side=9)}, "(n, 1, 8, 8), found (5, 1, 9, 9)"),
        ({"images": np.repeat(_array(), 3, axis=1)}, "(n, 1, 8, 8), found (5, 3, 8, 8)"),
        ({"images": _array(0)}, "holds no images"),
        ({"images": _array(), "labels": np.arange(4)}, "shape (5,), found (4,)"),
        ({"images": _array(), "labels": np.ones((5, 1), int)}, "shape (5,), found (5, 1)"),
        ({"images": _array(), "labels": np.ones(5)}, "must be integers, found float64"),
        ({"images": _array(), "labels": np.ones(5, bool)}, "must be integers, found bool"),
    ],
)
def test_arrays_that_do_not_fit(
    tmp_path: Path, suffix: str, arrays: dict[str, Any], words: str
) -> None:
    assert words in _refusal(_write(tmp_path / f"x{suffix}", **arrays))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_arrays_that_are_not_finite(tmp_path: Path, suffix: str, value: float) -> None:
    values = _array()
    values[3, 0, 2, 2] = value
    path = _write(tmp_path / f"x{suffix}", images=values)
    message = _refusal(path)
    assert "image 3" in message
    assert "NaN" in message
    assert len(open_images(path, GREY, limit=3)) == 3


def test_npz_files_that_torch_or_safety_refuse(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "marker"),)

    path = tmp_path / "x.npz"
    for arrays in (
        {"images": _array(), "labels": np.array([Payload()] * 5, dtype=object)},
        {"images": _array(), "labels": np.array(list("abcde"))},
        {"images": _array().astype(">f4")},
    ):
        np.savez(path, **arrays)
        assert "cannot be read as arrays" in _refusal(path)
    assert not (tmp_path / "marker").exists()
    with path.open("wb") as file:
        np.save(file, _array())
    assert "one array" in _refusal(path)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_truncated_arrays(tmp_path: Path, suffix: str) -> None:
    path = _write(tmp_path / f"x{suffix}", images=_array(), labels=np.arange(5))
    content = path.read_bytes()
    for length in (0, 1, 8, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        assert "cannot be read as arrays" in _refusal(path)
    path.write_text("these are not arrays")
    assert "cannot be read as arrays" in _refusal(path)


def test_damaged_npz_content(tmp_path: Path) -> None:
    path = _write(tmp_path / "x.npz", images=_array(), labels=np.arange(5))
    content = bytearray(path.read_bytes())
    content[200:210] = b"\xff" * 10
    path.write_bytes(content)
    assert "cannot be read as arrays" in _refusal(path)


# Any source


def test_sources_that_are_none(tmp_path: Path) -> None:
    assert "does not exist" in _refusal(tmp_path / "missing")
    assert "does not exist" in _refusal(tmp_path / "missing.npz")
    (tmp_path / "empty" / "sub").mkdir(parents=True)
    assert "no images in" in _refusal(tmp_path / "empty")
    (tmp_path / "empty" / "sub" / "notes.txt").write_text("nothing")
    assert "no images in" in _refusal(tmp_path / "empty")
    single = _picture(tmp_path / "one.png")
    assert "give a folder, .npz or .safetensors" in _refusal(single)
    (tmp_path / "x.npy").write_bytes(b"")
    assert "give a folder" in _refusal(tmp_path / "x.npy")
    for limit in (0, -1):
        with pytest.raises(UsageError, match="at least 1"):
            open_images(tmp_path, GREY, limit=limit)


def test_a_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert "cannot be listed: Permission denied" in _refusal(tmp_path)


def test_noise() -> None:
    for preprocessing in (GREY, RGB):
        images = noise_images(preprocessing, 5, 3)
        _check(images, 5, preprocessing)
        assert images.labels is None
        assert images.description == "5 noise images"
        assert torch.equal(_all(images), _all(noise_images(preprocessing, 5, 3)))
        assert torch.equal(_all(images)[:2], _all(noise_images(preprocessing, 2, 3)))
        assert not torch.equal(_all(images), _all(noise_images(preprocessing, 5, 4)))
    assert noise_images(GREY, 1, 0).description == "1 noise image"
    many = _all(noise_images(GREY, 200, 0))
    assert abs(float(many.mean())) < 0.03
    assert abs(float(many.std()) - 1) < 0.03
    with pytest.raises(UsageError, match="at least 1 image"):
        noise_images(GREY, 0, 0)
