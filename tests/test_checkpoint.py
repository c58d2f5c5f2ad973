"""Model files: what is told from them, what is refused, and that nothing in them is run."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ouro_compiler.archive import write_archive
from ouro_compiler.config import Preprocessing
from ouro_compiler.errors import ModelError, UsageError
from ouro_compiler.frontend.checkpoint import LoadedModel, load_model
from ouro_compiler.frontend.detect import detect
from ouro_compiler.models.vim import ARCHITECTURES, VIM_MICRO, Vim, VimConfig, vim_config

State = dict[str, Tensor]
SMALL = replace(VIM_MICRO, depth=1, embed_dim=16)
IMAGES = torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(7))
DIGITS = {"size": 28, "mean": [0.1307], "std": [0.3081], "crop": 1.0}


@lru_cache(maxsize=4)
def _vim(config: VimConfig = SMALL) -> Vim:
    torch.manual_seed(0)
    return config.build().eval().requires_grad_(False)


def _state(config: VimConfig = SMALL) -> State:
    return dict(_vim(config).state_dict())


def _meta_state(config: VimConfig) -> State:
    with torch.device("meta"):
        return dict(config.build().state_dict())


def _saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def _tensors(path: Path, state: State, **metadata: str) -> Path:
    save_file(state, path, metadata=metadata)
    return path


def _refusal(path: Path, **options: Any) -> str:
    """The message, which is one sentence that names the file."""
    with pytest.raises(ModelError) as caught:
        load_model(path, **options)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert "Traceback" not in message
    return message


# Formats


@pytest.mark.parametrize("name", ["v.pth", "v.pt", "v.bin", "v.safetensors"])
def test_a_state_dict_comes_back_bit_for_bit(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    (_tensors if name.endswith("safetensors") else _saved)(path, _state())
    loaded = load_model(path)
    assert isinstance(loaded.module, Vim)
    assert torch.equal(loaded.module(IMAGES), _vim()(IMAGES))
    assert not loaded.module.training
    assert not any(tensor.requires_grad for tensor in loaded.module.parameters())
    assert all(tensor.dtype == torch.float32 for tensor in loaded.module.parameters())
    assert loaded.name == "vim"
    _check_example(loaded, (2, 1, 28, 28))


def _check_example(loaded: LoadedModel, shape: tuple[int, ...]) -> None:
    expected = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded.example, expected)
    assert loaded.example.dtype == torch.float32
    side = loaded.preprocessing.size
    assert loaded.example.shape == (2, loaded.preprocessing.channels, side, side)


def test_the_file_before_torch_1_6(tmp_path: Path) -> None:
    path = tmp_path / "old.pth"
    torch.save(_state(), path, _use_new_zipfile_serialization=False)
    assert torch.equal(load_model(path).module(IMAGES), _vim()(IMAGES))


def test_content_decides_not_the_suffix(tmp_path: Path) -> None:
    for path in (
        _saved(tmp_path / "torch.safetensors", _state()),
        _tensors(tmp_path / "safe.pth", _state()),
        _tensors(tmp_path / "safe.pt2", _state()),
        _saved(tmp_path / "none", _state()),
    ):
        assert torch.equal(load_model(path).module(IMAGES), _vim()(IMAGES))
    exported = _exported(tmp_path).rename(tmp_path / "exported.pth")
    assert isinstance(load_model(exported).module, torch.export.ExportedProgram)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"model": state, "epoch": 3},
        lambda state: {"state_dict": state, "arch": "vim"},
        lambda state: {f"module.{key}": tensor for key, tensor in state.items()},
        lambda state: {f"encoder.{key}": tensor for key, tensor in state.items()},
        lambda state: {"model": {f"module.encoder.{k}": tensor for k, tensor in state.items()}},
    ],
)
def test_wrappers_and_prefixes(tmp_path: Path, wrap: Callable[[State], Any]) -> None:
    path = _saved(tmp_path / "v.pth", wrap(_state()))
    assert torch.equal(load_model(path).module(IMAGES), _vim()(IMAGES))


def test_a_prefix_in_safetensors(tmp_path: Path) -> None:
    state = {f"module.{key}": tensor for key, tensor in _state().items()}
    loaded = load_model(_tensors(tmp_path / "v.safetensors", state))
    assert torch.equal(loaded.module(IMAGES), _vim()(IMAGES))


def test_a_prefix_of_some_names_stays(tmp_path: Path) -> None:
    state = {f"module.{key}" if "head" in key else key: value for key, value in _state().items()}
    assert "head.weight" in _refusal(_saved(tmp_path / "v.pth", state))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_single(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {key: tensor.to(dtype) for key, tensor in _state().items()}
    for path in (_saved(tmp_path / "v.pth", state), _tensors(tmp_path / "v.safetensors", state)):
        found = load_model(path).module.state_dict()
        assert all(torch.equal(found[key], state[key].float()) for key in state)


# Architecture


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_known_architectures_from_shapes(name: str) -> None:
    expected = ARCHITECTURES[name]
    assert detect(_meta_state(expected)) == (name, expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"patch_size": 2, "stride": 2, "img_size": 14},
        {"in_chans": 3},
        {"embed_dim": 40},
        {"depth": 3},
        {"d_state": 8},
        {"d_conv": 3},
        {"expand": 1},
        {"dt_rank": 4},
        {"norm": "layer"},
        {"cls_position": "none"},
        {"img_size": 32},
    ],
)
def test_almost_a_known_architecture(changes: dict[str, Any]) -> None:
    name, found = detect(_meta_state(replace(VIM_MICRO, **changes)))
    assert name == "vim"
    assert all(getattr(found, key) == value for key, value in changes.items())


def test_the_number_of_classes_does_not_change_the_name() -> None:
    config = replace(ARCHITECTURES["vim_tiny"], num_classes=7)
    assert detect(_meta_state(config)) == ("vim_tiny", config)
    assert detect(_meta_state(config), arch="vim_tiny") == ("vim_tiny", config)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_classes": 3, "d_state": 8, "d_conv": 3, "expand": 1, "dt_rank": 5},
        {"norm": "layer"},
        {"cls_position": "none", "final_pool": "mean"},
        {"img_size": 40, "in_chans": 3, "depth": 2},
    ],
)
def test_everything_else_from_shapes(changes: dict[str, Any]) -> None:
    config = replace(SMALL, **changes)
    name, found = detect(_meta_state(config))
    assert name == "vim"
    assert found == replace(config, dt_rank=config.rank)
    assert found.if_divide_out


@pytest.mark.parametrize(
    ("stride", "cls", "tokens"),
    [(16, "middle", 197), (16, "none", 196), (8, "middle", 730), (8, "none", 729)],
)
def test_image_and_stride_of_patch_16(stride: Any, cls: Any, tokens: int) -> None:
    config = replace(vim_config("tiny", stride=stride), depth=1, cls_position=cls)
    state = _meta_state(config)
    assert state["pos_embed"].shape[1] == tokens
    found = detect(state)[1]
    assert (found.img_size, found.patch_size, found.stride) == (224, 16, stride)


def test_a_shallow_vim_tiny_from_a_file(tmp_path: Path) -> None:
    config = replace(vim_config("tiny"), depth=1)
    path = _saved(tmp_path / "vim_t_midclstok_76p1acc.pth", {"model": _state(config)})
    loaded = load_model(path)
    assert isinstance(loaded.module, Vim)
    assert loaded.module.config == replace(config, dt_rank=12)
    assert loaded.module.config.cls_position == "middle"
    assert loaded.module.config.if_divide_out
    assert torch.equal(loaded.module(loaded.example), _vim(config)(loaded.example))
    assert loaded.preprocessing == Preprocessing()


def test_arch_and_metadata_choose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One with the same shapes as another, told apart by its name alone."""
    other = replace(SMALL, cls_position="head", if_divide_out=False)
    monkeypatch.setitem(ARCHITECTURES, "small", SMALL)
    monkeypatch.setitem(ARCHITECTURES, "other", other)
    plain = _saved(tmp_path / "v.pth", _state())
    tagged = _tensors(tmp_path / "v.safetensors", _state(), architecture="other")
    with pytest.raises(UsageError, match=r"fit small and other.*--arch"):
        load_model(plain)
    for loaded, name, config in (
        (load_model(plain, arch="other"), "other", other),
        (load_model(tagged), "other", other),
        (load_model(tagged, arch="small"), "small", SMALL),
    ):
        assert isinstance(loaded.module, Vim)
        assert (loaded.name, loaded.module.config) == (name, config)


def test_arch_that_is_unknown_or_does_not_fit(tmp_path: Path) -> None:
    path = _saved(tmp_path / "v.pth", _state())
    with pytest.raises(UsageError, match=r"'vim_huge'.*vim_micro, vim_tiny"):
        load_model(path, arch="vim_huge")
    message = _refusal(path, arch="vim_tiny")
    assert "cls_token has shape (1, 1, 16), but vim_tiny expects (1, 1, 192)" in message


def test_another_family(tmp_path: Path) -> None:
    message = _refusal(_saved(tmp_path / "v.pth", {"features.0.weight": torch.ones(2)}))
    assert "not the weights of a Vim, VMamba, MambaVision or ViT" in message
    assert "found features.0.weight" in message


# Weights that do not fit


def test_missing_and_unexpected_tensors(tmp_path: Path) -> None:
    for key in ("layers.0.mixer.D_b", "pos_embed", "layers.0.mixer.A_log", "head.bias"):
        state = _state()
        del state[key]
        message = _refusal(_saved(tmp_path / "v.pth", state))
        assert "missing" in message
        assert key in message
    extra = {f"rope.{index}": torch.ones(1) for index in range(5)}
    message = _refusal(_saved(tmp_path / "v.pth", _state() | extra))
    assert "rope.0, rope.1, rope.2 and 2 more" in message


@pytest.mark.parametrize(
    ("key", "shape", "words"),
    [
        ("head.bias", (11,), "head.bias has shape (11,), but vim expects (10,)"),
        ("pos_embed", (50, 16), "pos_embed has shape (50, 16)"),
        ("pos_embed", (1, 0, 16), "pos_embed has shape (1, 0, 16)"),
        ("pos_embed", (1, 51, 16), "no square grid"),
        ("pos_embed", (1, 1, 16), "no square grid"),
        ("layers.0.mixer.in_proj.weight", (33, 16), "in_proj.weight has 33 rows"),
        ("patch_embed.proj.weight", (16, 1, 4, 2), "expects (16, 1, 4, 4)"),
        ("patch_embed.proj.weight", (16, 2, 4, 4), "2 channels"),
    ],
)
def test_wrong_shapes(tmp_path: Path, key: str, shape: tuple[int, ...], words: str) -> None:
    state = _state() | {key: torch.zeros(shape)}
    assert words in _refusal(_saved(tmp_path / "v.pth", state))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(tmp_path: Path, value: float) -> None:
    state = {key: tensor.clone() for key, tensor in _state().items()}
    state["layers.0.mixer.D"][3] = value
    for path in (_saved(tmp_path / "v.pth", state), _tensors(tmp_path / "v.safetensors", state)):
        assert "tensor layers.0.mixer.D holds NaN or infinite" in _refusal(path)


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(10, dtype=torch.int64),
        torch.zeros(10, dtype=torch.complex64),
        torch.zeros(10, dtype=torch.float8_e4m3fn),
        torch.zeros(10).to_sparse(),
        torch.zeros(10, device="meta"),
        torch.zeros(1).expand(10),
    ],
)
def test_tensors_that_are_no_weights(tmp_path: Path, weight: Tensor) -> None:
    assert "head.bias" in _refusal(_saved(tmp_path / "v.pth", _state() | {"head.bias": weight}))


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {"model": 3}, {1: torch.ones(2)}, 5])
def test_no_state_dict(tmp_path: Path, content: Any) -> None:
    assert "holds no state_dict" in _refusal(_saved(tmp_path / "v.pth", content))


def test_no_tensors(tmp_path: Path) -> None:
    assert "no tensors" in _refusal(_saved(tmp_path / "v.pth", {}))
    assert "no tensors" in _refusal(_tensors(tmp_path / "v.safetensors", {}, by="me"))


# Metadata


def test_metadata_of_the_example(tmp_path: Path) -> None:
    state = _state(VIM_MICRO)
    path = tmp_path / "digits.safetensors"
    _tensors(path, state, architecture="vim_micro", preprocessing=json.dumps(DIGITS))
    loaded = load_model(path)
    assert loaded.name == "vim_micro"
    assert loaded.preprocessing == Preprocessing.from_dict(DIGITS | {"mean": (0.1307,)})
    assert torch.equal(loaded.module(IMAGES), _vim(VIM_MICRO)(IMAGES))


TIMM = {"input_size": [1, 28, 28], "mean": [0.2], "std": [0.3], "crop_pct": 0.9}


@pytest.mark.parametrize("holder", [None, "pretrained_cfg", "default_cfg"])
def test_preprocessing_from_timms_config(holder: str | None, tmp_path: Path) -> None:
    content = {"architecture": "vim", **(TIMM if holder is None else {holder: TIMM})}
    (tmp_path / "config.json").write_text(json.dumps(content))
    found = load_model(_saved(tmp_path / "v.pth", _state())).preprocessing
    assert found == Preprocessing(size=28, mean=(0.2,), std=(0.3,), crop=0.9)


def test_a_files_own_metadata_wins_over_a_config_beside_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TIMM))
    path = tmp_path / "v.safetensors"
    _tensors(path, _state(), preprocessing=json.dumps(DIGITS))
    assert load_model(path).preprocessing.mean == (0.1307,)


@pytest.mark.parametrize("content", ["[1, 2]", "{}", json.dumps({"hidden_size": 3})])
def test_a_config_of_something_else_says_nothing(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    assert load_model(_saved(tmp_path / "v.pth", _state())).preprocessing.mean == (0.5,)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{not json", "config.json beside it cannot be used"),
        (json.dumps(TIMM | {"input_size": [1, 28, 14]}), "input_size must be"),
        (json.dumps(TIMM | {"input_size": [1, 32, 32]}), "but the model takes 1 and 28"),
        (json.dumps(TIMM | {"mean": "x"}), "mean has a value"),
        (json.dumps({"mean": [0.1, 0.2, 0.3], "std": [1, 1, 1]}), "images of 3 channels"),
    ],
)
def test_a_config_that_does_not_fit_is_an_error(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    assert words in _refusal(_saved(tmp_path / "v.pth", _state()))


def test_preprocessing_without_metadata(tmp_path: Path) -> None:
    grey = load_model(_saved(tmp_path / "v.pth", _state())).preprocessing
    assert grey == Preprocessing(size=28, mean=(0.5,), std=(0.5,))
    colour = load_model(_saved(tmp_path / "c.pth", _state(replace(SMALL, in_chans=3))))
    assert colour.preprocessing == Preprocessing(size=28)
    _check_example(colour, (2, 3, 28, 28))


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"architecture": "resnet"}, "unknown architecture 'resnet'; known are vim_micro"),
        ({"architecture": "vim_tiny"}, "but vim_tiny expects"),
        ({"preprocessing": "{size: 28"}, "cannot be used"),
        ({"preprocessing": "[" * 100_000}, "cannot be used"),
        ({"preprocessing": "[28]"}, "expected a JSON object"),
        ({"preprocessing": json.dumps(DIGITS | {"sigma": 1})}, "no field sigma"),
        ({"preprocessing": json.dumps(DIGITS | {"size": "28"})}, "size has a value"),
        ({"preprocessing": json.dumps(DIGITS | {"size": True})}, "size has a value"),
        ({"preprocessing": json.dumps(DIGITS | {"mean": 0.5})}, "mean has a value"),
        ({"preprocessing": json.dumps(DIGITS | {"mean": [float("nan")]})}, "mean has a value"),
        ({"preprocessing": json.dumps(DIGITS | {"std": ["1"]})}, "std has a value"),
        ({"preprocessing": json.dumps(DIGITS | {"std": [0]})}, "std > 0"),
        ({"preprocessing": json.dumps(DIGITS | {"crop": None})}, "crop has a value"),
        ({"preprocessing": json.dumps(DIGITS | {"size": 32})}, "but the model takes 1 and 28"),
        ({"preprocessing": json.dumps({"size": 28})}, "images of 3 channels"),
    ],
)
def test_metadata_is_strict(tmp_path: Path, metadata: dict[str, str], words: str) -> None:
    assert words in _refusal(_tensors(tmp_path / "v.safetensors", _state(), **metadata))


# Files that are no model


def test_missing_folder_empty_and_text(tmp_path: Path) -> None:
    assert "does not exist" in _refusal(tmp_path / "none.pth")
    assert "does not exist" in _refusal(tmp_path / "none.pth" / "below.pth")
    assert "no regular file" in _refusal(tmp_path)
    for suffix in (".pth", ".safetensors", ".pt2"):
        path = tmp_path / f"v{suffix}"
        path.write_bytes(b"")
        assert "it is empty" in _refusal(path)
        path.write_text("the weights are at another place\n")
        assert "no model file" in _refusal(path)
    os.mkfifo(tmp_path / "pipe.pth")
    assert "no regular file" in _refusal(tmp_path / "pipe.pth")


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        (["v/readme.txt"], "without a model"),
        (["data.pkl"], "without a model"),
        (["v/data.pkl", "v/constants.pkl", "v/code/__torch__.py"], "TorchScript"),
        (["serialized_exported_program.json", "version"], "format of torch 2.7"),
    ],
)
def test_other_zip_archives(tmp_path: Path, entries: list[str], words: str) -> None:
    path = tmp_path / "v.pth"
    with zipfile.ZipFile(path, "w") as archive:
        for entry in entries:
            archive.writestr(entry, "")
    assert words in _refusal(path)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors", "exported"])
def test_truncation(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "whole"
    if kind == "safetensors":
        _tensors(path, _state())
    elif kind == "exported":
        path = _exported(tmp_path)
    else:
        torch.save(_state(), path, _use_new_zipfile_serialization=kind == "zip")
    data = path.read_bytes()
    load_model(path)
    cut = tmp_path / "cut.pth"
    lengths = [1, 3, 4, 7, 8, 9, 10, 30, 100, 1000, 2000]
    for length in [*lengths, *(len(data) * part // 10 for part in range(1, 10)), len(data) - 1]:
        cut.write_bytes(data[:length])
        assert "cut short" in _refusal(cut)


# Pickles


class _Payload:
    """Unpickling it leaves a file behind."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def _write_payload(path: Path, payload: _Payload, kind: str) -> None:
    content = {"model": _state(), "args": payload}
    if kind == "bare":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")


@pytest.mark.parametrize("kind", ["zip", "legacy", "bare"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".pt2"])
def test_a_malicious_file_is_not_run(tmp_path: Path, kind: str, suffix: str) -> None:
    path, marker = tmp_path / f"v{suffix}", tmp_path / "marker"
    _write_payload(path, _Payload(marker), kind)
    message = _refusal(path)
    assert "holds pickled Python objects" in message
    assert "--allow-pickle only if you trust its author" in message
    assert not marker.exists()


def test_the_malicious_file_would_run(tmp_path: Path) -> None:
    """What makes the test above worth something."""
    path, marker = tmp_path / "v.pth", tmp_path / "marker"
    _write_payload(path, _Payload(marker), "zip")
    load_model(path, allow_pickle=True)
    assert marker.exists()


def test_a_malicious_exported_file_is_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    source, path = _exported(tmp_path), tmp_path / "bad.pt2"
    pickled = pickle.dumps(_Payload(marker))
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new:
        for entry in old.namelist():
            new.writestr(entry, pickled if entry.endswith("model.pt") else old.read(entry))
        new.writestr(f"{entry.partition('/')[0]}/data/constants/custom_obj_0", pickled)
    _refusal(path, allow_pickle=True)
    assert not marker.exists()


class CfgNode(dict[str, Any]):
    """As yacs has it: a dictionary of a class that is not here when the file is read."""


class Schedule:
    """An optimizer's or scheduler's object: arguments, state, a method that must not run."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __setstate__(self, state: dict[str, Any]) -> None:
        raise AssertionError("its code ran")


def test_training_checkpoints_open_without_pickle(tmp_path: Path) -> None:
    """As Vim and VMamba write them: arguments, configuration, numpy scalars, optimizer, epoch."""
    content = {
        "model": _state(),
        "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]},
        "args": argparse.Namespace(lr=0.1, device=torch.device("cpu"), path=Path("x")),
        "config": CfgNode(MODEL=CfgNode(TYPE="vssm", DEPTHS=[2, 2]), SEED=0),
        "lr_scheduler": Schedule(3),
        "max_accuracy": np.float64(81.5),
        "history": np.arange(4.0),
        "epoch": 299,
    }
    path = _saved(tmp_path / "v.pth", content)
    assert torch.equal(load_model(path).module(IMAGES), _vim()(IMAGES))


@pytest.mark.parametrize("key", ["model_ema", "state_dict_ema"])
def test_averages_of_weights(key: str, tmp_path: Path) -> None:
    """Beside the weights they are read with `ema` alone; without weights they are read anyway."""
    average = {name: tensor * 0.5 for name, tensor in _state().items()}
    path = _saved(tmp_path / "v.pth", {"model": _state(), key: average, "args": Path("x")})
    assert torch.equal(load_model(path).module(IMAGES), _vim()(IMAGES))
    averaged = load_model(path, ema=True).module.state_dict()
    assert all(torch.equal(averaged[name], tensor) for name, tensor in average.items())
    only = _saved(tmp_path / "only.pth", {key: average, "epoch": 3})
    assert torch.equal(load_model(only).module(IMAGES), load_model(path, ema=True).module(IMAGES))


def test_averages_that_are_not_there(tmp_path: Path) -> None:
    assert "nothing under model_ema" in _refusal(_saved(tmp_path / "v.pth", _state()), ema=True)
    plain = _tensors(tmp_path / "v.safetensors", _state())
    assert "only training checkpoints do" in _refusal(plain, ema=True)


def test_a_file_that_needs_no_pickle_is_not_unpickled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, load = _saved(tmp_path / "v.pth", _state()), torch.load

    def safe_only(*args: Any, weights_only: bool, **options: Any) -> Any:
        assert weights_only
        return load(*args, weights_only=weights_only, **options)

    monkeypatch.setattr(torch, "load", safe_only)
    load_model(path, allow_pickle=True)


def test_a_pickled_module(tmp_path: Path) -> None:
    path = _saved(tmp_path / "my_vim.pth", SMALL.build().half().train())
    assert "pickled Python objects" in _refusal(path)
    loaded = load_model(path, allow_pickle=True)
    assert loaded.name == "my_vim"
    assert isinstance(loaded.module, Vim)
    assert not loaded.module.training
    assert all(
        tensor.dtype == torch.float32 and not tensor.requires_grad
        for tensor in loaded.module.parameters()
    )
    _check_example(loaded, (2, 1, 28, 28))
    with pytest.raises(UsageError, match="whole model"):
        load_model(path, arch="vim_tiny", allow_pickle=True)


@pytest.mark.parametrize(
    ("attributes", "shape"),
    [
        ({}, (3, 224, 224)),
        ({"img_size": 32}, (3, 32, 32)),
        ({"img_size": (48, 48), "in_chans": 1}, (1, 48, 48)),
        ({"default_cfg": {"input_size": (1, 64, 64)}}, (1, 64, 64)),
        ({"default_cfg": {"input_size": (3, 64, 64)}, "img_size": 32}, (3, 32, 32)),
        ({"config": argparse.Namespace(img_size=40), "img_size": 32}, (3, 40, 40)),
        ({"default_cfg": {}}, (3, 224, 224)),
        ({"img_size": (32, 16)}, "square"),
        ({"img_size": "big"}, "square"),
        ({"img_size": 0}, "square"),
        ({"in_chans": 4}, "4 channels"),
    ],
)
def test_the_input_of_a_pickled_module(
    tmp_path: Path, attributes: dict[str, Any], shape: tuple[int, int, int] | str
) -> None:
    module = nn.Sequential(nn.ReLU())
    for name, value in attributes.items():
        setattr(module, name, value)
    path = _saved(tmp_path / "m.pth", module)
    if isinstance(shape, str):
        assert shape in _refusal(path, allow_pickle=True)
    else:
        _check_example(load_model(path, allow_pickle=True), (2, *shape))


def test_pickles_that_do_not_work(tmp_path: Path) -> None:
    module = nn.Linear(2, 2)
    module.weight.data[0] = float("nan")
    path = _saved(tmp_path / "m.pth", module)
    assert "tensor weight holds NaN" in _refusal(path, allow_pickle=True)
    (tmp_path / "marker").mkdir()  # so that the payload's own call fails
    _write_payload(path, _Payload(tmp_path / "marker"), "zip")
    assert "cannot be unpickled (FileExistsError" in _refusal(path, allow_pickle=True)


# torch.export


class _Net(nn.Module):
    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 2, 3)

    def forward(self, images: Tensor) -> Tensor:
        pooled: Tensor = self.conv(images).mean((2, 3))
        return pooled


class _Two(nn.Module):
    def forward(self, images: Tensor, scale: Tensor) -> Tensor:
        return images * scale


def _program(
    module: nn.Module | None = None, shape: tuple[int, ...] = (2, 1, 12, 12)
) -> torch.export.ExportedProgram:
    dynamic = ({0: torch.export.Dim("batch", min=1, max=64)},)
    module = module or _Net(shape[1])
    dtype = next((tensor.dtype for tensor in module.parameters()), torch.float32)
    return torch.export.export(module, (torch.zeros(shape, dtype=dtype),), dynamic_shapes=dynamic)


def _exported(folder: Path) -> Path:
    torch.manual_seed(0)
    torch.export.save(_program(), folder / "net.pt2")
    return folder / "net.pt2"


def test_an_exported_program(tmp_path: Path) -> None:
    loaded = load_model(_exported(tmp_path))
    assert isinstance(loaded.module, torch.export.ExportedProgram)
    assert loaded.name == "net"
    assert loaded.preprocessing == Preprocessing(size=12, mean=(0.5,), std=(0.5,))
    assert not any(tensor.requires_grad for tensor in loaded.module.parameters())
    _check_example(loaded, (2, 1, 12, 12))
    assert loaded.module.module()(loaded.example).shape == (2, 2)
    with pytest.raises(UsageError, match="whole model"):
        load_model(tmp_path / "net.pt2", arch="vim_tiny")


def test_a_compiled_artefact(tmp_path: Path) -> None:
    write_archive(_program(), tmp_path / "done.pt2", {"schema": 1})
    message = _refusal(tmp_path / "done.pt2")
    assert "compiled already" in message
    assert "ouro inspect" in message


def test_exported_programs_of_no_images(tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    bad = _Net()
    bad.conv.bias.data[0] = float("nan")  # type: ignore[union-attr]
    two = torch.export.export(_Two(), (torch.zeros(2, 3, 4, 4), torch.ones(1)))
    for program, words in (
        (_program(shape=(2, 2, 12, 12)), "2 channels"),
        (_program(shape=(2, 1, 12, 10)), "(1, 12, 10)"),
        (_program(nn.Linear(3, 2), (4, 3)), "one tensor, images"),
        (two, "one tensor, images"),
        (_program(_Net().half()), "torch.float16"),
        (_program(bad), "conv.bias holds NaN"),
    ):
        torch.export.save(program, path)
        assert words in _refusal(path)


def test_an_exported_program_of_any_size(tmp_path: Path) -> None:
    side = torch.export.Dim("side", min=8, max=64)
    program = torch.export.export(
        _Net(), (torch.zeros(2, 1, 12, 12),), dynamic_shapes=({2: side, 3: side},)
    )
    torch.export.save(program, tmp_path / "net.pt2")
    assert "one fixed size" in _refusal(tmp_path / "net.pt2")
