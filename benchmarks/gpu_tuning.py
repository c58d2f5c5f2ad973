"""Tuning in suite "gpu": what it finds for every model and preset, as rows, before they are timed.

A row's name is gpu/MODEL/tuning/VARIANT. What an earlier run tuned on this machine is not done
again; a machine without a table is tuned, so that rows that say "tuned" are.
"""

from __future__ import annotations

import copy
import gc
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import ouro_compiler as ouro
from benchmarks.gpu_models import PRESETS, TUNED, VARIANTS, row_name
from benchmarks.registry import Row
from benchmarks.resume import Rows
from benchmarks.subjects import Subject, Variant, sentence
from ouro_compiler.cli.tune import tuning_data
from ouro_compiler.config import QuantConfig
from ouro_compiler.runtime.tune import Tuning


def tuned_variants() -> dict[str, Variant]:
    """Our compiled variants, under the names of their tuned rows."""
    return {f"{name}{TUNED}": VARIANTS[name] for name in PRESETS}


def tune_models(
    rows: Rows,
    models: Sequence[str],
    batches: Sequence[int],
    *,
    images: int,
    seconds: float,
    device: str = "cuda",
    artefacts: Path | None = None,
    presets: Mapping[str, QuantConfig] = PRESETS,
    tune: Callable[..., Tuning] = ouro.tune,
) -> None:
    """Tune every model and preset of which a tuned row is still to be made, and add a row of it."""
    for name in models:
        subject: Subject | None = None
        for key, config in presets.items():
            names = [row_name(name, batch, f"{key}{TUNED}") for batch in batches]
            if not any(rows.wants(one, None) for one in names):
                continue
            subject = subject or Subject(name, images, device, artefacts)
            rows.add(_tuning(subject, key, config, batches, seconds, tune))
            gc.collect()


def _tuning(
    subject: Subject,
    key: str,
    config: QuantConfig,
    batches: Sequence[int],
    seconds: float,
    tune: Callable[..., Tuning],
) -> Row:
    name = f"gpu/{subject.name}/tuning/{key}"
    row: Row = {"row": name, "seed": None, "kind": "tuning", "model": subject.name}
    row |= {"variant": key, "tried": None, "left": None, "kernels": [], "reason": None}
    begin = time.perf_counter()
    try:
        here = copy.deepcopy(subject.compiled(config)[0]).to(subject.device)
        found = tuning_data(tune(here, batches, seconds))
        row |= {one: found[one] for one in ("tried", "left", "kernels")}
    except Exception as error:  # whatever it raises is the row's reason
        row["reason"] = sentence(error)
    row["seconds"] = round(time.perf_counter() - begin, 1)
    print(f"{name}: {row['seconds']} s", file=sys.stderr)
    return row
