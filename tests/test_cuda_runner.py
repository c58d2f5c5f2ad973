"""Running on a GPU: CUDA graphs give the graph's bits. What needs none runs on the CPU here."""

from __future__ import annotations

import copy
import gc
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import ouro_compiler as ouro
from ouro_compiler.errors import UsageError
from ouro_compiler.runtime.compiled_model import CompiledModel
from ouro_compiler.runtime.cuda_graphs import CudaGraphs
from ouro_compiler.runtime.cuda_runner import CudaGraphWarning, CudaRunner, device_of
from ouro_compiler.runtime.folding import call_directly, fold_constants
from tests.models import compiled_vim, images


def by_graph(model: CompiledModel, batch: Tensor) -> Tensor:
    with torch.no_grad():
        return model.graph_module(batch)


class Captures:
    """Captures a function by remembering it: what it computes is the real thing."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.replayed = 0

    def __call__(self, function: Callable[[Tensor], Any], batch: Tensor) -> Callable[..., Any]:
        self.sizes.append(len(batch))

        def replay(given: Tensor) -> Any:
            self.replayed += 1
            return function(given)

        return replay


def test_graphs_from_the_second_batch_of_a_size() -> None:
    model, captures = compiled_vim(), Captures()
    runner = CudaRunner(model.graph_module, captures)
    for seed, size in enumerate((1, 3, 1, 1, 3, 2)):
        batch = images(size, seed=seed)
        assert torch.equal(runner(batch), by_graph(model, batch))
    assert captures.sizes == [1, 3]
    assert captures.replayed == 3


def test_graphs_can_be_turned_off() -> None:
    captures = Captures()
    runner = CudaRunner(compiled_vim().graph_module, captures)
    for _ in range(3):
        runner(images(2), graphs=False)
    assert captures.sizes == []


def test_a_capture_that_fails_is_said_once_and_the_graph_runs() -> None:
    def capture(function: Callable[[Tensor], Any], batch: Tensor) -> Callable[..., Any]:
        try:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        finally:
            raise ValueError("the capture was invalidated")

    model = compiled_vim()
    runner = CudaRunner(model.graph_module, capture)
    runner(images(2))
    with pytest.warns(
        CudaGraphWarning, match=r"batches of 2 run without .*: RuntimeError: operation not permi"
    ):
        runner(images(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(runner(images(2)), by_graph(model, images(2)))


def test_outputs_in_inference_mode_may_be_used_under_autograd() -> None:
    runner = CudaRunner(compiled_vim().graph_module, Captures())
    for _ in range(2):
        with torch.inference_mode():
            found = runner(images(2))
        assert not found.is_inference()


def test_the_device_is_that_of_the_constants() -> None:
    assert device_of(compiled_vim().graph_module) == torch.device("cpu")
    assert device_of(fx.symbolic_trace(nn.ReLU())) == torch.device("cpu")
    assert device_of(fx.symbolic_trace(nn.Linear(2, 2, device="meta"))).type == "meta"


def test_kernels_of_the_device_are_called() -> None:
    folded = fold_constants(compiled_vim().graph_module)
    on_gpu = {one.target for one in call_directly(folded, "cuda").graph.nodes}
    on_cpu = {one.target for one in call_directly(folded, "cpu").graph.nodes}
    ours = {str(one) for one in on_gpu if str(one).startswith("ouro.")}
    assert "run" in {getattr(one, "__name__", "") for one in on_gpu}
    assert ours.isdisjoint({"ouro.selective_scan.default", "ouro.linear_dynamic_outlier.default"})
    assert on_gpu != on_cpu


def test_images_elsewhere_are_refused() -> None:
    model = copy.deepcopy(compiled_vim())
    model.graph_module.to("meta")
    with pytest.raises(UsageError, match="images are on cpu, the model is on meta: move one"):
        model(images(2))


# From here on a GPU is needed.


@pytest.fixture
def on_gpu() -> Iterator[CompiledModel]:
    model = copy.deepcopy(compiled_vim()).cuda()
    model(images(1).cuda())
    yield model
    del model
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", CudaGraphWarning)
        yield


def graphs_of(model: CompiledModel) -> int:
    assert isinstance(model._runner, CudaRunner)
    return len(model._runner._graphs)


@pytest.mark.gpu
def test_folding_changes_no_bit(on_gpu: CompiledModel) -> None:
    batch = images(3).cuda()
    with torch.no_grad():
        folded = fold_constants(on_gpu.graph_module)
        assert torch.equal(folded(batch), by_graph(on_gpu, batch))
        assert torch.equal(call_directly(folded, "cuda")(batch), by_graph(on_gpu, batch))


@pytest.mark.gpu
@pytest.mark.parametrize("preset", ["w4a4", "w4a8", "w8a8"])
@pytest.mark.usefixtures("no_warnings")
def test_gpu_the_same_bits_as_the_graph(preset: str) -> None:
    """Sizes in turn, so that graphs, CUDA graphs and dropped ones all run."""
    model = copy.deepcopy(compiled_vim(ouro.config.PRESETS[preset])).cuda()
    for round_ in range(3):
        for size in (1, 3, 2, 1, 5, 8):
            batch = images(size, seed=10 * round_ + size).cuda()
            assert torch.equal(model(batch), by_graph(model, batch)), (round_, size)
    assert graphs_of(model) == 4


@pytest.mark.gpu
@pytest.mark.usefixtures("no_warnings")
def test_gpu_outputs_are_the_callers_own(on_gpu: CompiledModel) -> None:
    batches = [images(2, seed=seed).cuda() for seed in range(4)]
    found = [on_gpu(one) for one in batches]
    for one, batch in zip(found, batches, strict=True):
        assert torch.equal(one, by_graph(on_gpu, batch))
        assert not one.is_inference()


@pytest.mark.gpu
@pytest.mark.usefixtures("no_warnings")
def test_gpu_streams(on_gpu: CompiledModel) -> None:
    """Images are made late on a side stream; the next call, on another stream, is not mixed up."""
    batches = [images(2, seed=seed).cuda() for seed in range(6)]
    expected = [by_graph(on_gpu, one * 2) for one in batches]
    for _ in range(2):
        on_gpu(batches[0])
    streams = [torch.cuda.Stream() for _ in batches]
    torch.cuda.synchronize()
    found = []
    for stream, batch in zip(streams, batches, strict=True):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            late = batch * 2
            found.append(on_gpu(late))
    torch.cuda.synchronize()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.usefixtures("no_warnings")
def test_gpu_threads(on_gpu: CompiledModel) -> None:
    """Each on a stream of its own, with sizes that are captured meanwhile."""
    sizes = (1, 2, 3)
    expected = {size: by_graph(on_gpu, images(size, seed=size).cuda()) for size in sizes}
    wrong: list[object] = []

    def work(offset: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for index in range(12):
                    size = sizes[(index + offset) % 3]
                    found = on_gpu(images(size, seed=size).cuda())
                    torch.cuda.current_stream().synchronize()
                    if not torch.equal(found, expected[size]):
                        wrong.append(size)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.gpu
@pytest.mark.usefixtures("no_warnings")
def test_gpu_a_replay_waits_for_nothing_and_takes_no_memory(on_gpu: CompiledModel) -> None:
    batch = images(4).cuda()
    for _ in range(3):
        found = on_gpu(batch)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            found = on_gpu(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before
    assert torch.equal(found, by_graph(on_gpu, batch))


@pytest.mark.gpu
@pytest.mark.usefixtures("no_warnings")
def test_gpu_memory_of_many_sizes_is_bounded(on_gpu: CompiledModel) -> None:
    def all_sizes() -> int:
        for size in (1, 2, 3, 4, 5, 6, 7, 8):
            for _ in range(2):
                on_gpu(images(size).cuda())
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    rounds = [all_sizes() for _ in range(6)]
    assert graphs_of(on_gpu) == 4
    assert rounds[5] <= 1.25 * rounds[1]


@pytest.mark.gpu
def test_gpu_moved_and_copied(on_gpu: CompiledModel) -> None:
    batch = images(2)
    expected = [on_gpu(batch.cuda()) for _ in range(3)][2]
    other = copy.deepcopy(on_gpu)
    assert other._runner is None
    assert torch.equal(other(batch.cuda()), expected)
    with pytest.raises(UsageError, match="images are on cpu, the model is on cuda:0"):
        on_gpu(batch)
    on_gpu.to("cpu")
    assert on_gpu._runner is None
    assert torch.equal(on_gpu(batch), compiled_vim()(batch))


@pytest.mark.gpu
def test_gpu_in_a_capture_of_the_users_own(on_gpu: CompiledModel) -> None:
    static = images(2).cuda()
    for _ in range(2):
        on_gpu(static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = on_gpu(static)
    static.copy_(images(2, seed=5))
    graph.replay()
    assert torch.equal(found, by_graph(on_gpu, images(2, seed=5).cuda()))


@pytest.mark.gpu
def test_gpu_a_capture_that_fails() -> None:
    """A graph that waits for the GPU cannot be captured; afterwards everything works."""

    class Waits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight + torch.nonzero(x).shape[0]

    x = torch.randn(2, 3, device="cuda")
    runner = CudaRunner(fx.symbolic_trace(Waits().cuda()))
    runner(x)
    stream = torch.cuda.current_stream()
    with pytest.warns(CudaGraphWarning, match="batches of 2 run without a CUDA graph"):
        second = runner(x)
    assert torch.cuda.current_stream() == stream
    assert torch.equal(second, x + 6)
    triple = CudaGraphs(torch.device("cuda", 0)).capture(lambda one: one * 3, x)
    assert torch.equal(triple(x + 1), (x + 1) * 3)
