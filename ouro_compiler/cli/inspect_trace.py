"""`ouro inspect --trace FILE`: one run of an artefact, node by node, for Perfetto or Chrome."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from ouro_compiler.errors import UsageError

if TYPE_CHECKING:
    import torch

    from ouro_compiler.cli.inspect import InspectRequest

_WARM = 2  # runs before the one that is kept: kernels are built, the tape is made


def write(request: InspectRequest, path: Path) -> None:
    """Write Chrome's trace format. Raises OuroError subclasses."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from ouro_compiler.cli.inspect_page import images_of_artefact
    from ouro_compiler.runtime.artifact import is_artifact, load

    if not is_artifact(Path(request.source.name)):
        raise UsageError("--trace runs an artefact: compile the model first")
    if path.suffix not in (".json", ".gz"):
        raise UsageError(f"--trace {path}: call it .json, or .json.gz to compress it")
    compiled = load(request.source.name)
    images, _ = images_of_artefact(compiled, request.calibration, request.images or 1)
    batch = torch.cat(list(images.batches(len(images))))
    labels = _labels(compiled.graph_module)
    for _ in range(_WARM):
        compiled.traced(batch, labels)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        compiled.traced(batch, labels)
    partial = path.parent / f"{os.getpid()}.partial.{path.name}"  # its end says whether to compress
    try:
        profiler.export_chrome_trace(str(partial))
        os.replace(partial, path)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)
    print(path)


def _labels(gm: torch.fx.GraphModule) -> dict[str, str]:
    """`linear_dynamic_outlier_5 layers.0.mixer.out_proj` for a layer; name and op for others."""
    from ouro_compiler.inspection.nodes import node_rows

    return {row["name"]: f"{row['name']} {row['layer'] or row['op']}" for row in node_rows(gm)}
