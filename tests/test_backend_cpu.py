"""torch.compile(model, backend="ouro") on CPU tensors runs generated C++, not the references."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from ouro_compiler import backend
from ouro_compiler.kernels.cpp import launch as cpp_launch
from ouro_compiler.kernels.cpp.toolchain import find_toolchain
from ouro_compiler.kernels.dispatch import ReferenceWarning
from ouro_compiler.kernels.spec import KernelSpec
from tests.models import compiled_vim, images, small_vim

pytestmark = pytest.mark.skipif(find_toolchain() is None, reason="needs a C++ compiler")


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """Nothing that another test compiled is found again."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often compiled C++ was called, by template."""
    counts: Counter[str] = Counter()

    class Counting(dict):  # type: ignore[type-arg]
        def __setitem__(self, spec: KernelSpec, function: cpp_launch.Function) -> None:
            def counted(words: Any, threads: int) -> None:
                counts[spec.template.value] += 1
                function(words, threads)

            super().__setitem__(spec, counted)

    monkeypatch.setattr(cpp_launch, "_functions", Counting())
    return counts


def test_every_operator_of_a_compiled_model_is_generated_cpp(
    monkeypatch: pytest.MonkeyPatch, called: Counter[str]
) -> None:
    graphs: list[backend.CompiledGraph] = []
    made = backend.CompiledGraph.__init__

    def keep(self: backend.CompiledGraph, *args: Any) -> None:
        made(self, *args)
        graphs.append(self)

    monkeypatch.setattr(backend.CompiledGraph, "__init__", keep)
    options = {"config": "w4a4", "calibration": images()}
    model = torch.compile(small_vim(), backend="ouro", options=options)
    x = images(2, seed=1)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", ReferenceWarning)
        model(x)  # calibrates, compiles kernels and checks them
        called.clear()
        found = model(x)
    (graph,) = graphs
    names = [str(node.target) for node in graph.graph_module.graph.nodes]
    ours = Counter(name.split(".")[1] for name in names if name.startswith("ouro."))
    assert called == ours
    assert {"linear_dynamic_outlier", "selective_scan_dynamic_outlier"} <= set(ours)
    assert {row.kernel == "reference" for row in graph.report.kernels} == {False}
    torch.testing.assert_close(found, compiled_vim()(x), rtol=0.1, atol=0.1)
