"""torch.compile(model, backend="ouro"): the codes of compile(), and what is refused or left."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import ouro_compiler as ouro
from ouro_compiler.backend import CompiledGraph
from ouro_compiler.backend import ouro as backend
from ouro_compiler.compiler import TensorImages
from ouro_compiler.config import Preprocessing, SynthesisSpec
from ouro_compiler.data import noise_images
from ouro_compiler.evaluation import snr_db
from ouro_compiler.frontend.checkpoint import load_model
from ouro_compiler.models.vim import vim_micro
from ouro_compiler.runtime.compiled_model import CompiledModel
from tests.models import compiled_vim, images, small_vim

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    """Nothing that another test compiled is found again."""
    torch._dynamo.reset()


class Spy:
    """The backend, keeping what it returned. Called without gradients, as inference is."""

    def __init__(self, model: Callable[[Tensor], Any], **settings: Any) -> None:
        options = {"calibration": images(), "inner": "eager", **settings.pop("options", {})}
        self.graphs: list[Any] = []
        self.compiled = torch.compile(model, backend=self.keep, options=options, **settings)

    def keep(self, gm: torch.fx.GraphModule, inputs: list[Any], **keywords: Any) -> Any:
        self.graphs.append(backend(gm, inputs, **keywords))
        return self.graphs[-1]

    def __call__(self, x: Tensor) -> Any:
        with torch.no_grad():
            return self.compiled(x)


def left_alone(model: Callable[[Tensor], Any], x: Tensor, words: str, **settings: Any) -> Spy:
    """One warning with these words, and the model's own outputs."""
    spy = Spy(model, **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = spy(x)
    told = [str(one.message) for one in caught if str(one.message).startswith("ouro:")]
    assert len(told) == 1, told
    assert words in told[0]
    with torch.no_grad():
        assert torch.equal(found, model(x))
    return spy


def same_constants(graph: CompiledGraph, model: CompiledModel) -> None:
    """Every code, scale and other constant is the same, under the same name."""
    held, expected = dict(graph.graph_module.named_buffers()), model.program.state_dict
    assert held.keys() == expected.keys()
    for name, value in expected.items():
        assert held[name].dtype == value.dtype
        assert torch.equal(held[name], value), name


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_a_static_batch_gives_the_codes_and_outputs_of_compile(batch: int) -> None:
    spy = Spy(small_vim())
    x = images(batch, seed=1)
    assert torch.equal(spy(x), compiled_vim()(x))
    same_constants(spy.graphs[0], compiled_vim())


def test_a_dynamic_batch_is_compiled_once() -> None:
    spy = Spy(small_vim(), dynamic=True, options={"config": ouro.W8A8})
    for batch in (3, 2, 7):
        x = images(batch, seed=1)
        assert torch.equal(spy(x), compiled_vim(ouro.W8A8)(x))
    assert len(spy.graphs) == 1
    same_constants(spy.graphs[0], compiled_vim(ouro.W8A8))


def test_another_batch_makes_dynamo_ask_for_a_dynamic_graph() -> None:
    spy = Spy(small_vim())
    for batch in (2, 3, 4):
        x = images(batch, seed=1)
        assert torch.equal(spy(x), compiled_vim()(x))
    assert len(spy.graphs) == 2


def test_names_and_report_are_those_of_compile() -> None:
    spy = Spy(small_vim(), options={"config": "w4a4"})
    spy(images(2))
    found = spy.graphs[0].report.to_dict(timing=False)
    assert found == {**compiled_vim().report, "config": found["config"]}
    exclude = dataclasses.replace(ouro.W4A4, exclude=("layers.0.mixer.out_proj",))
    spy = Spy(small_vim(), options={"config": exclude})
    spy(images(2))
    row = next(r for r in spy.graphs[0].report.layers if r.name == "layers.0.mixer.out_proj")
    assert row.reason == "excluded by the configuration"


def test_the_digits_example_equals_its_artefact(tmp_path: Path) -> None:
    weights, some = EXAMPLES / "vim_digits.safetensors", 8
    artefact = tmp_path / "digits.pt2"
    command = [sys.executable, "-m", "ouro_compiler", "compile", str(weights), "--w4a4", "-q"]
    command += ["--calibration", str(EXAMPLES / "digits_calibration.npz")]
    command += ["--images", str(some), "-o", str(artefact)]
    subprocess.run(command, check=True)
    expected = ouro.load(artefact)
    options = {"calibration": str(EXAMPLES / "digits_calibration.npz"), "images": some}
    test = torch.from_numpy(np.load(EXAMPLES / "digits_test.npz")["images"][:40])
    spy = Spy(load_model(weights).module, options=options, dynamic=True)
    assert torch.equal(spy(test), expected(test))
    same_constants(spy.graphs[0], expected)


def test_inductor_runs_the_graph_between_our_ops() -> None:
    spy = Spy(small_vim(), dynamic=True, options={"inner": "inductor"})
    for batch in (2, 5):
        x = images(batch, seed=1)
        expected = compiled_vim()(x)
        assert (spy(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert len(spy.graphs) == 1
    same_constants(spy.graphs[0], compiled_vim())


def test_a_machine_without_a_compiler_is_told_and_runs_eagerly() -> None:
    from torch._inductor import config

    spy = Spy(small_vim(), options={"inner": "inductor"})
    # monkeypatch would leave the setting deleted for the tests behind this one.
    with (
        config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.warns(UserWarning, match=r"ouro: .*needs a C\+\+ compiler"),
    ):
        assert torch.equal(spy(images(2)), compiled_vim()(images(2)))


STANDALONE = """
import sys, torch
model = torch.nn.Sequential(torch.nn.Flatten(2), torch.nn.Linear(16, 16)).eval()
x = torch.randn(4, 3, 4, 4)
assert "ouro" in torch._dynamo.list_backends(), torch._dynamo.list_backends()
assert not any(name.startswith("ouro_compiler") for name in sys.modules)
options = {"config": "w4a4", "calibration": x, "inner": "eager"}
with torch.no_grad():
    y = torch.compile(model, backend="ouro", options=options)(x)
    error = (y - model(x)).norm() / model(x).norm()
assert 0 < error < 0.3, error
"""


def test_the_entry_point_needs_no_import_of_ours(tmp_path: Path) -> None:
    """Installed metadata as pip writes it; the environment's own may be another version."""
    pyproject = (EXAMPLES.parent / "pyproject.toml").read_text()
    section = pyproject.split("[project.entry-points.torch_dynamo_backends]\n")[1]
    points = section.split("\n\n")[0].replace('"', "")
    info = tmp_path / "ouro_compiler_backend-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ouro_compiler_backend\n")
    (info / "entry_points.txt").write_text(f"[torch_dynamo_backends]\n{points}\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{STANDALONE}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=EXAMPLES.parent)


# What is compiled beside plain classifiers


class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vim = small_vim()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.vim(x), "mean": x.mean((1, 2, 3))}


def test_several_outputs() -> None:
    found = Spy(TwoOutputs())(images(3, seed=1))
    assert torch.equal(found["logits"], compiled_vim()(images(3, seed=1)))
    assert torch.equal(found["mean"], images(3, seed=1).mean((1, 2, 3)))


class Mamba2dLayout(nn.Module):
    """Views with the batch in the middle, as mamba_ssm has them, and a state of zeros."""

    def __init__(self, channels: int = 28) -> None:
        super().__init__()
        self.proj = nn.Linear(28, 2 * channels)
        self.out = nn.Linear(channels, 5)
        self.register_buffer("offset", torch.ones(channels), persistent=False)
        self.scale = torch.full((channels,), 0.5)  # neither a parameter nor a buffer
        self.gain = 2.0

    def forward(self, x: Tensor) -> Tensor:
        batch, _, length, channels = x.shape
        tokens = self.proj(x.reshape(batch * length, channels))
        tokens = tokens.t().reshape(2 * channels, batch * length)
        both = tokens.view(2, channels, batch, length)
        state = torch.zeros(batch, channels) + self.offset.view(1, -1).expand(batch, channels)
        state = state + (both[0] * self.scale).sum(-1).t() if channels == length else state
        return self.out((both[1].permute(1, 2, 0) + state.unsqueeze(1)) * self.gain)


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("dynamic", [None, True])
def test_the_batch_is_freed_wherever_it_is(batch: int, dynamic: bool | None) -> None:
    torch.manual_seed(0)
    model = Mamba2dLayout().eval().requires_grad_(False)
    spy = Spy(model, dynamic=dynamic)
    expected = ouro.compile(model, images(2), calibration=images())
    x = images(batch, seed=1)
    assert torch.equal(spy(x), expected(x))
    assert isinstance(spy.graphs[0], CompiledGraph)


def test_two_models_of_one_architecture_keep_their_weights() -> None:
    first, second = small_vim(), vim_micro(depth=1).eval().requires_grad_(False)
    options = {"calibration": images(), "inner": "eager"}
    one, two = (torch.compile(m, backend=backend, options=options) for m in (first, second))
    expected = ouro.compile(second, images(2), calibration=images())
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(one(images(2)), compiled_vim()(images(2)))
            assert torch.equal(two(images(2)), expected(images(2)))


def test_new_weights_are_seen_and_changed_ones_are_not() -> None:
    model = vim_micro(depth=1).eval().requires_grad_(False)
    spy = Spy(model)
    before = spy(images(2))
    model.head.weight.mul_(2)
    model.head.bias.add_(1)
    assert torch.equal(spy(images(2)), before)
    model.head = nn.Linear(48, 10).requires_grad_(False)
    assert torch.equal(
        spy(images(2)), ouro.compile(model, images(2), calibration=images())(images(2))
    )


# What is left as it was


class Broken(nn.Module):
    """A quantizable half on the image, a graph break, and a half whose input has its shape."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(28, 28), nn.Linear(28, 28)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x.flatten(1, 2)).view(-1, 1, 28, 28)
        torch._dynamo.graph_break()
        return self.second(hidden.flatten(1, 2))


def test_what_follows_a_graph_break_is_left_alone() -> None:
    torch.manual_seed(0)
    model = Broken().eval().requires_grad_(False)
    spy = Spy(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = spy(images(4))
    told = [str(one.message) for one in caught if str(one.message).startswith("ouro:")]
    assert len(told) == 1
    assert "graph break" in told[0]
    assert [isinstance(graph, CompiledGraph) for graph in spy.graphs] == [True, False]
    assert 0 < (found - model(images(4))).abs().max() < 1


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(784, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1))


class MeanOfBatch(nn.Module):
    """A sample's output depends on the others, by way of the batch size."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x[index] for index in range(x.shape[0])]) / x.shape[0]


def test_what_cannot_be_calibrated_or_quantized_is_left_alone() -> None:
    x = images(2)
    left_alone(Mlp(), x, "nothing to quantize: head: its input is no token sequence")
    left_alone(nn.ReLU(), x, "nothing to quantize: it has no linear layer")
    left_alone(nn.Linear(14, 14), torch.randn(2, 14, 14), "shape (B, 14, 14), the calibration")
    left_alone(MeanOfBatch(), x, "it holds for batches of 2 alone")
    left_alone(lambda ids: nn.functional.one_hot(ids, 4), torch.tensor([1, 3]), "no image")
    noise = {"calibration": "noise", "images": 2}
    left_alone(nn.Linear(14, 14), torch.randn(2, 14, 14), "no square image", options=noise)


def test_two_images_and_other_outputs_are_left_alone() -> None:
    vim = small_vim()
    x = images(2)
    both = torch.compile(
        lambda a, b: vim(a) + vim(b), backend=backend, options={"calibration": images()}
    )
    with torch.no_grad(), pytest.warns(UserWarning, match="takes 2 tensors"):
        assert torch.equal(both(x, x + 1), vim(x) + vim(x + 1))
    sized = Spy(lambda a: (vim(a), a.shape[0] * 2), dynamic=True)
    with pytest.warns(UserWarning, match="something else than tensors"):
        assert sized(x)[1] == 4


def test_strict_refuses_what_would_be_left() -> None:
    for model, words in ((Broken(), "graph break"), (nn.ReLU(), None)):
        spy = Spy(model.eval().requires_grad_(False), options={"strict": True})
        if words is None:
            with pytest.warns(UserWarning, match="nothing to quantize"):
                spy(images(2))
        else:
            with pytest.raises(BackendCompilerFailed, match=f"RefusedLayerError: .*{words}"):
                spy(images(2))


# What is refused


def refused(words: str, model: nn.Module | None = None, **options: Any) -> None:
    """Dynamo's error shows our class and sentence."""
    torch._dynamo.reset()
    with pytest.raises(BackendCompilerFailed, match=f"UsageError: .*{words}"):
        Spy(model or small_vim(), options=options)(images(2))


def test_options_that_cannot_be_used(tmp_path: Path) -> None:
    refused("no option bits: options are calibration, config", bits=4)
    refused("there is no preset 'w2a2': presets are w4a4", config="w2a2")
    refused("config must be a QuantConfig", config=4)
    refused(r"must be fp32 images \(n, C, H, W\)", calibration=images().half())
    refused("calibration must be a tensor, a path", calibration=3)
    refused("does not exist", calibration=str(tmp_path / "none"))
    refused("inner must be inductor or eager", inner="triton")
    refused("images must be a whole number", calibration="noise", images=0)
    refused("images limits a path", images=3)
    refused("strict must be True", strict="yes")
    refused("cache must be True", cache=1)
    refused("preprocessing must be", preprocessing={"size": 28})
    refused("not finite", calibration=torch.full((2, 1, 28, 28), torch.nan))
    with pytest.raises(BackendCompilerFailed, match="UsageError: the ouro backend has no modes"):
        torch.compile(small_vim(), backend=backend, mode="max-autotune")(images(2))


class Inside(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu"):
            return x @ x


def test_autocast_is_refused() -> None:
    with torch.autocast("cpu"):
        refused("autocast is on")
    refused("autocast is on", Inside())


def test_training_and_gradients() -> None:
    dropout = nn.Sequential(nn.Flatten(2), nn.Linear(784, 4), nn.Dropout(0.5))
    refused("training mode", dropout.train())
    assert Spy(dropout.eval().requires_grad_(False))(images(2)).shape == (2, 1, 4)
    torch._dynamo.reset()
    norm = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(2), nn.Linear(784, 4))
    refused("training mode", norm.train())
    model = vim_micro(depth=1).eval().bfloat16()
    half = torch.compile(model, backend=backend, options={"calibration": images()})
    with pytest.raises(BackendCompilerFailed, match=r"UsageError: .*call model.float\(\)"):
        half(images(2).bfloat16())
    wanting = images(2).clone().requires_grad_()
    compiled = torch.compile(small_vim(), backend=backend, options={"calibration": images()})
    with pytest.raises(BackendCompilerFailed, match="UsageError: the images require gradients"):
        compiled(wanting)
    torch._dynamo.reset()
    options = {"calibration": images(), "inner": "eager"}
    trainable = vim_micro(depth=1).eval()
    compiled = torch.compile(trainable, backend=backend, options=options)
    with pytest.warns(UserWarning, match="no gradients flow"):
        assert not compiled(images(2)).requires_grad


def test_images_objects_and_noise_are_calibration_too() -> None:
    """torch compares options with ==, which wrapped tensors answer by identity."""
    with torch.no_grad():
        for seed in (0, 1):
            wrapped = TensorImages(images(16, seed))
            options = {"calibration": wrapped, "inner": "eager"}
            found = torch.compile(small_vim(), backend=backend, options=options)(images(2))
            expected = ouro.compile(small_vim(), images(2), calibration=wrapped)
            assert torch.equal(found, expected(images(2)))
    noise = noise_images(Preprocessing(size=28, mean=(0.5,), std=(0.5,)), 4, seed=0)
    spy = Spy(small_vim(), options={"calibration": "noise", "images": 4})
    expected = ouro.compile(small_vim(), images(2), calibration=noise)
    assert torch.equal(spy(images(2)), expected(images(2)))


TINY = SynthesisSpec(images=2, iterations=2, batch_size=2)


def test_without_calibration_images_are_synthesised() -> None:
    """The graph is another than compile()'s, and so may be the last bits of its images."""
    spy = Spy(small_vim(), options={"calibration": TINY, "cache": False})
    x = images(3, seed=1)
    expected = ouro.compile(small_vim(), images(2), calibration=TINY, cache=False)
    assert snr_db(expected(x), spy(x)) > 30
    row = spy.graphs[0].report.calibration
    assert row.description == "2 synthetic images"
    assert row.synthesis == expected.report["calibration"]["synthesis"]
    assert spy.graphs[0].report.snr_data == "2 synthetic images"


@pytest.mark.parametrize("named", [None, "synthetic"])
def test_synthesis_is_the_default(named: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def make(gm: Any, shape: Any, spec: SynthesisSpec, **keywords: Any) -> TensorImages:
        asked.append(spec)
        return TensorImages(images(2))

    monkeypatch.setattr("ouro_compiler.backend.synthetic_images", make)
    config = dataclasses.replace(ouro.W4A4, seed=3)
    Spy(small_vim(), options={"calibration": named, "images": 5, "config": config})(images(2))
    assert asked == [SynthesisSpec(images=5, seed=3)]


def test_what_nothing_can_be_synthesised_from_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(28, 28), nn.ReLU()).eval().requires_grad_(False)
    left_alone(model, images(2), "cannot be synthesised", options={"calibration": None})
    flat = nn.Sequential(nn.Linear(6, 4)).eval().requires_grad_(False)
    left_alone(flat, torch.ones(3, 5, 6), "no square image", options={"calibration": None})
