"""Checkpoints of VMamba, MambaVision and ViT: which model they are, and what is to be asked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ouro_compiler.config import Preprocessing
from ouro_compiler.errors import ModelError, UsageError
from ouro_compiler.frontend.checkpoint import LoadedModel, load_model
from ouro_compiler.frontend.detect import ARCHITECTURES, detect, with_current_names
from ouro_compiler.frontend.families import FAMILIES
from ouro_compiler.models import mambavision, vit
from ouro_compiler.models.vit import ViT, ViTConfig
from ouro_compiler.models.vmamba import VMamba
from tests import test_mambavision, test_vit, test_vmamba
from tests.helpers import randn

State = dict[str, Tensor]
VMAMBA, VANILLA, MAMBAVISION = test_vmamba.SMALL, test_vmamba.VANILLA, test_mambavision.SMALL
VIT = test_vit.SMALL
# Sizes that differ in nothing that shapes tell.
TWINS = {
    "mambavision_large2": ("mambavision_large2", "mambavision_large2_512"),
    "mambavision_large3_256": ("mambavision_large3_256", "mambavision_large3_512"),
    **{f"vit_{size}": (f"vit_{size}", f"deit_{size}") for size in ("tiny", "small", "base")},
}
TWIN_OF = {name: pair for pair in TWINS.values() for name in pair}
NEW = [name for family in FAMILIES[1:] for name in family.architectures]


def _meta_state(config: Any) -> State:
    with torch.device("meta"):
        return dict(config.build().state_dict())


def _state(config: Any) -> State:
    torch.manual_seed(0)
    return dict(config.build().eval().state_dict())


def _saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def _refusal(path: Path, **options: Any) -> str:
    with pytest.raises(ModelError) as caught:
        load_model(path, **options)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def _assert_loaded(loaded: LoadedModel, config: Any, state: State) -> None:
    images = randn(3, 2, 3, loaded.preprocessing.size, loaded.preprocessing.size)
    expected = config.build().eval().requires_grad_(False)
    expected.load_state_dict(state)
    assert torch.equal(loaded.module(images), expected(images))


@pytest.mark.parametrize("name", [name for name in NEW if name not in TWIN_OF])
def test_sizes_that_shapes_tell(name: str) -> None:
    assert detect(_meta_state(ARCHITECTURES[name])) == (name, ARCHITECTURES[name])


@pytest.mark.parametrize("name", TWIN_OF)
def test_sizes_that_shapes_do_not_tell(name: str) -> None:
    state = _meta_state(replace(ARCHITECTURES[name], num_classes=7))
    first, second = TWIN_OF[name]
    with pytest.raises(UsageError) as caught:
        detect(state)
    assert f"fit {first} and {second}" in str(caught.value)
    assert "--arch" in str(caught.value)
    assert detect(state, arch=name) == (name, replace(ARCHITECTURES[name], num_classes=7))


@pytest.mark.parametrize(
    "config",
    [
        VMAMBA,
        VANILLA,
        replace(VMAMBA, downsample="v2", in_chans=1, depths=(1, 2, 1)),
        replace(VMAMBA, ssm_ratio=2.0, mlp_ratio=3.0, d_state=4, d_conv=5, gate=True),
        replace(VMAMBA, depths=(2,)),
    ],
)
def test_a_vmamba_of_another_size_is_told_in_full(config: Any) -> None:
    assert detect(_meta_state(config)) == ("vmamba", replace(config, img_size=224))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (MAMBAVISION, "number of heads and the size of the windows"),
        (VIT, "number of heads and how"),
    ],
)
def test_another_size_that_shapes_do_not_tell_in_full(
    tmp_path: Path, config: Any, words: str
) -> None:
    message = _refusal(_saved(tmp_path / "v.pth", _state(config)))
    assert "of no known size" in message
    assert words in message


def test_arch_of_another_family() -> None:
    with pytest.raises(ModelError, match="weights of the VMamba family, not of vim_tiny"):
        detect(_meta_state(VMAMBA), arch="vim_tiny")


def test_vmamba_from_a_file(tmp_path: Path) -> None:
    for config in (VMAMBA, VANILLA):
        state = _state(config)
        loaded = load_model(_saved(tmp_path / "v.pth", {"model": state, "epoch": 1}))
        assert isinstance(loaded.module, VMamba)
        assert loaded.preprocessing == Preprocessing()
        loaded.module.config = replace(loaded.module.config, img_size=32)
        images = randn(0, 2, 3, 32, 32)
        expected = config.build().eval()
        expected.load_state_dict(state)
        assert torch.equal(loaded.module(images), expected(images).detach())


def test_names_of_the_first_vmambas(tmp_path: Path) -> None:
    state = _state(VANILLA)
    old = {}
    for key, value in state.items():
        key = key.replace("patch_embed.0", "patch_embed.proj").replace(
            "patch_embed.2", "patch_embed.norm"
        )
        key = key.replace(".op.", ".self_attention.").removeprefix("classifier.")
        if ".blocks." in key and ".self_attention." not in key:
            key = key.replace(".norm.", ".ln_1.")
        old[key] = value
    assert {"head.weight", "norm.bias", "patch_embed.proj.bias"} <= set(old)
    assert {"layers.0.blocks.0.ln_1.weight", "layers.0.blocks.0.self_attention.Ds"} <= set(old)
    assert {"layers.0.downsample.norm.weight"} <= set(old)
    found = with_current_names(old)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in state)
    loaded = load_model(_saved(tmp_path / "old.pth", {"model": old}))
    assert torch.equal(
        loaded.module.state_dict()["classifier.head.bias"], state["classifier.head.bias"]
    )


def test_linears_stored_as_convolutions(tmp_path: Path) -> None:
    state = _state(VMAMBA)
    pointwise = ("in_proj.weight", "out_proj.weight", "fc1.weight", "fc2.weight")
    stored = {k: v[..., None, None] if k.endswith(pointwise) else v for k, v in state.items()}
    loaded = load_model(_saved(tmp_path / "v.pth", stored))
    found = loaded.module.state_dict()
    assert all(torch.equal(found[key], state[key]) for key in state)


def test_other_families_keep_their_names() -> None:
    state = _state(VIT)
    assert with_current_names(state) == state


def test_mambavision_from_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(MAMBAVISION, img_size=64, crop=0.93)
    monkeypatch.setitem(mambavision.ARCHITECTURES, "small", config)
    state = _state(config)
    files = [
        _saved(tmp_path / "a.tar", {"state_dict": state, "arch": "x", "state_dict_ema": {}}),
        _saved(tmp_path / "b.pth", {"state_dict_ema": state, "epoch": 3}),
        _saved(tmp_path / "c.pth", {"model_ema": state}),
        _saved(tmp_path / "d.pth", {f"module.{key}": value for key, value in state.items()}),
    ]
    files.append(tmp_path / "e.safetensors")
    save_file({f"model.{key}": value for key, value in state.items()}, files[-1])
    for path in files:
        loaded = load_model(path)
        assert loaded.name == "small"
        assert loaded.preprocessing == Preprocessing(size=64, crop=0.93)
        _assert_loaded(loaded, config, state)
        count = loaded.module.state_dict()["norm.num_batches_tracked"]
        assert count.dtype == torch.int64


def test_vit_from_a_file_is_normalised_as_its_name_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = replace(VIT, mean=(0.5,) * 3, std=(0.5,) * 3)
    for name, config in (("small_vit", half), ("small_deit", VIT)):
        monkeypatch.setitem(vit.ARCHITECTURES, name, config)
    state = _state(VIT)
    plain = _saved(tmp_path / "v.pth", {"model": state})
    with pytest.raises(UsageError, match=r"fit small_vit and small_deit"):
        load_model(plain)
    tagged = tmp_path / "v.safetensors"
    save_file(state, tagged, metadata={"architecture": "small_vit"})
    for loaded, config in (
        (load_model(plain, arch="small_vit"), half),
        (load_model(tagged), half),
        (load_model(plain, arch="small_deit"), VIT),
    ):
        expected = Preprocessing(size=16, mean=config.mean, std=config.std, crop=0.9)
        assert loaded.preprocessing == expected
        _assert_loaded(loaded, config, state)


def test_grey_vits_have_the_default_preprocessing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(vit.ARCHITECTURES, "grey", replace(VIT, in_chans=1))
    loaded = load_model(_saved(tmp_path / "v.pth", _state(replace(VIT, in_chans=1))))
    assert isinstance(loaded.module, ViT)
    assert loaded.preprocessing == Preprocessing(size=16, mean=(0.5,), std=(0.5,))


# Damage


@pytest.mark.parametrize(
    ("config", "key", "shape", "words"),
    [
        (
            VMAMBA,
            "layers.0.blocks.0.op.A_logs",
            None,
            "needs the tensor layers.0.blocks.0.op.A_logs",
        ),
        (VMAMBA, "layers.1.blocks.0.op.Ds", None, "missing: layers.1.blocks.0.op.Ds"),
        (VMAMBA, "classifier.head.weight", None, "needs the tensor classifier.head.weight"),
        (VMAMBA, "layers.0.blocks.0.op.x_proj_weight", (2, 3, 16), "expects (4, 3, 16)"),
        (VMAMBA, "layers.0.blocks.0.op.x_proj_weight", (4, 48), "has 3 non-empty dimensions"),
        (VMAMBA, "layers.0.downsample.1.weight", (16,), "has 4 non-empty dimensions"),
        (VMAMBA, "patch_embed.0.weight", (8, 2, 3, 3), "takes images of 2 channels"),
        (VMAMBA, "rope.freqs", (3,), "tensors that vmamba does not have: rope.freqs"),
        (VANILLA, "layers.0.downsample.norm.weight", None, "layers.0.downsample.norm.weight"),
        (MAMBAVISION, "levels.2.blocks.0.mixer.A_log", None, "mixer.A_log, which is missing"),
        (MAMBAVISION, "head.weight", None, "head.weight, which is missing"),
        (MAMBAVISION, "levels.3.blocks.1.mixer.qkv.bias", None, "missing: levels.3.blocks.1.mixer"),
        (MAMBAVISION, "norm.running_var", (31,), "norm.running_var has shape (31,)"),
        (VIT, "pos_embed", (1, 18, 16), "no square grid"),
        (VIT, "pos_embed", (18, 16), "has 3 non-empty dimensions"),
        (VIT, "blocks.1.attn.qkv.bias", None, "missing: blocks.1.attn.qkv.bias"),
        (VIT, "head_dist.weight", (5, 16), "tensors that small_vit does not have: head_dist"),
    ],
)
def test_damaged_checkpoints(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    config: Any,
    key: str,
    shape: tuple[int, ...] | None,
    words: str,
) -> None:
    monkeypatch.setitem(mambavision.ARCHITECTURES, "small_mambavision", MAMBAVISION)
    monkeypatch.setitem(vit.ARCHITECTURES, "small_vit", VIT)
    state = _state(config)
    if shape is None:
        del state[key]
    else:
        state[key] = torch.zeros(shape)
    assert words in _refusal(_saved(tmp_path / "v.pth", state))


@pytest.mark.parametrize(
    "count", [torch.zeros(2, dtype=torch.int64), torch.zeros((), dtype=torch.int64, device="meta")]
)
def test_a_count_of_batches_is_one_number(tmp_path: Path, count: Tensor) -> None:
    state = _state(MAMBAVISION) | {"norm.num_batches_tracked": count}
    assert "norm.num_batches_tracked" in _refusal(_saved(tmp_path / "v.pth", state))


def test_every_name_is_of_one_family() -> None:
    names = [name for family in FAMILIES for name in family.architectures]
    assert len(set(names)) == len(names)
    assert list(ARCHITECTURES) == names


def test_vit_config_has_the_heads_of_the_public_sizes() -> None:
    found = {name: config.heads for name, config in vit.ARCHITECTURES.items()}
    assert found["deit_tiny"] == 3
    assert found["vit_small"] == 6
    assert found["vit_base"] == 12
    assert all(isinstance(config, ViTConfig) for config in vit.ARCHITECTURES.values())
