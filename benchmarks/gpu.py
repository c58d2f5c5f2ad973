"""Suite "gpu": models and kernels on a CUDA device, against others and against its ceilings.

    python -m benchmarks.run --suite gpu --json FILE [--filter REGEX] [--models A,B]
        [--batches 1,8,32,128] [--rounds 9] [--images 2] [--artefacts FOLDER] [--tune SECONDS]
    python -m benchmarks.gpu_table FILE

--filter is searched in "gpu/kernels/bBATCH/GROUP" and "gpu/MODEL/bBATCH/VARIANT". Rows are written
as they come and a run that was cut off goes on. A row without numbers has the reason: what computes
something else gets none. Kernels run with their default blocks; with --tune they are tuned first,
SECONDS for every model and preset, and rows of their own say what our variants then take. Not run
on a GPU yet.
"""

from __future__ import annotations

import argparse
import platform
import re

import torch

from benchmarks.cpu import versions
from benchmarks.gpu_kernels import group_name, measure_gpu_kernels
from benchmarks.gpu_models import measure_models
from benchmarks.gpu_tuning import tune_models, tuned_variants
from benchmarks.kernel_cases import all_groups
from benchmarks.registry import Row, suite
from benchmarks.resume import Rows
from ouro_compiler.kernels.tuned import defaults_only

MODELS = (
    *("vim_tiny", "vim_small", "vim_base"),
    *("vmamba_tiny_s1l8", "vmamba_base_s1l20", "mambavision_tiny"),
)
SIZES = ("Vim-T", "Vim-B")  # whose kernels have rows of their own


@suite("gpu")
def gpu(options: argparse.Namespace) -> list[Row]:
    """Rows of kind machine, ceiling, kernel and model; prints them as they come."""
    if not torch.cuda.is_available():
        raise SystemExit("suite gpu needs a CUDA device, and this machine has none")
    pattern = options.filter or ""
    batches = [int(one) for one in (options.batches or "1,8,32,128").split(",")]
    rows = Rows(options.json, "gpu", pattern)
    rows.add(machine())
    models = options.models.split(",") if options.models else MODELS
    given = {"images": options.images, "artefacts": options.artefacts}
    if options.tune is not None:
        tune_models(rows, models, batches, seconds=options.tune, **given)
        variants = tuned_variants()
        measure_models(rows, models, batches, rounds=options.rounds, variants=variants, **given)
        return rows.rows
    groups = [one for batch in batches for one in all_groups(batch, SIZES)]
    wanted = [one for one in groups if re.search(pattern, group_name(one))]
    with defaults_only():
        measure_gpu_kernels(rows, wanted, rounds=options.rounds)
        measure_models(rows, models, batches, rounds=options.rounds, **given)
    return rows.rows


def machine() -> Row:
    """What the numbers were made with: no paths, no host names."""
    properties = torch.cuda.get_device_properties(0)
    return {
        **{"row": "gpu/machine", "seed": None, "reason": None, "kind": "machine"},
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "packages": versions("triton", "mamba_ssm", "causal_conv1d", "einops"),
    }
