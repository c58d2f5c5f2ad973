"""`ouro compile`: from a file and options to an artefact, a table and a report."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ouro_compiler.cli.calibration import (
    calibration_images,
    check_calibration,
    labelled_images,
    synthesis_progress,
)
from ouro_compiler.cli.console import human_bytes, print_table, progress_bars, write_json
from ouro_compiler.cli.precision import print_mixed, print_refined, replayed, verdict
from ouro_compiler.cli.source import ModelSource
from ouro_compiler.config import (
    PRESETS,
    MixedSpec,
    QuantConfig,
    RefineSpec,
    SynthesisSpec,
    Target,
)
from ouro_compiler.errors import UsageError

if TYPE_CHECKING:
    from ouro_compiler.data import ImageData
    from ouro_compiler.frontend.checkpoint import LoadedModel
    from ouro_compiler.runtime.compiled_model import CompiledModel


@dataclass(frozen=True, kw_only=True)
class CompileRequest:
    """The command's options, as given."""

    source: ModelSource
    preset: str
    output: Path | None
    calibration: str | None
    images: int
    iterations: int | None
    cache: bool
    ssm: Any
    recipe: str
    settings: tuple[str, ...]
    outliers: Any
    inlier_scale: Any
    target: Target | Any
    precompile: str | None
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    verify: str | None
    max_drop: float | None
    refine: bool
    mixed: bool
    budget_mb: float | None
    min_snr: float | None
    replay: Path | None
    dry_run: bool
    strict: bool
    report: Path | None
    batch_size: int
    seed: int
    quiet: bool

    @cached_property
    def config(self) -> QuantConfig:
        """The preset with the options applied, or what --replay says."""
        return self._of_options if self.replay is None else replayed(self.replay, self._of_options)

    @property
    def _of_options(self) -> QuantConfig:
        preset = PRESETS[self.preset]
        config = dataclasses.replace(
            preset,
            activations=dataclasses.replace(
                preset.activations, outliers=self.outliers, inlier_scale=self.inlier_scale
            ),
            ssm=self.ssm,
            recipe=self.recipe,
            include=self.include,
            exclude=self.exclude,
            seed=self.seed,
        )
        for setting in self.settings:
            config = config.with_setting(setting)
        if self.refine and not config.refine.epochs:
            epochs = RefineSpec().epochs
            config = dataclasses.replace(
                config, refine=dataclasses.replace(config.refine, epochs=epochs)
            )
        return config

    @property
    def search(self) -> MixedSpec | None:
        """What bits are to be chosen for; None where they are not. Raises UsageError."""
        if not (self.mixed or self.budget_mb is not None or self.min_snr is not None):
            return None
        if self.replay is not None:
            raise UsageError(
                "--replay takes the bits of layers from a report: leave out the search"
            )
        return MixedSpec(budget_mb=self.budget_mb, min_snr=self.min_snr, max_drop=self.max_drop)

    @property
    def destination(self) -> Path:
        """Where the artefact goes."""
        kind = self.preset if self.replay is None else "replayed"
        kind = kind if self.search is None else f"{kind}.mixed"
        return self.output or Path(f"{self.source.stem}.{kind}.pt2")


def run(request: CompileRequest) -> None:
    """Do what the command says. Raises OuroError subclasses; nothing is left half-written."""
    _check(request)
    loaded = request.source.load()
    if request.dry_run:
        _dry_run(request, loaded)
        return
    calibration = calibration_images(
        request.calibration,
        loaded.preprocessing,
        count=request.images,
        iterations=request.iterations,
        seed=request.seed,
    )
    verify = (
        None if request.verify is None else labelled_images(request.verify, loaded.preprocessing)
    )
    compiled = _compile(request, loaded, calibration, verify)
    report = compiled.full_report
    failure = verdict(request.max_drop, report)
    if failure is None:
        compiled.save(request.destination)
        if request.precompile is not None:
            report["precompiled"] = _precompile(request, compiled)
    if request.report is not None:
        write_json(request.report, report)
    if not request.quiet:
        _print_result(request, report, saved=failure is None)
    if failure is not None:
        raise failure


def _check(request: CompileRequest) -> None:
    """Refuse before any work what cannot end well."""
    from ouro_compiler.recipes import find_recipe

    if request.max_drop is not None and request.verify is None:
        raise UsageError("--max-drop needs --verify DATA to measure a drop on")
    find_recipe(request.config.recipe).configure(request.config)
    if request.search is not None and request.dry_run:
        raise UsageError("--dry-run does not measure layers: leave out the search for bits")
    check_calibration(request.calibration, request.iterations)
    if request.precompile is not None:
        from ouro_compiler.kernels.offline import parse_architectures

        parse_architectures(request.precompile)
        if request.target != "cuda":
            raise UsageError("--precompile compiles CUDA kernels: it needs --target cuda")
    for option, path in (("--output", request.destination), ("--report", request.report)):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise UsageError(f"{option} {path}: not a file in an existing folder")
    if request.verify is not None and not request.dry_run:
        from ouro_compiler.runtime.compiled_model import resolve_device

        resolve_device(request.target)  # verification runs on the target


def _compile(
    request: CompileRequest,
    loaded: LoadedModel,
    calibration: ImageData | SynthesisSpec,
    verify: ImageData | None,
) -> CompiledModel:
    from ouro_compiler.compiler import compile

    with synthesis_progress(request.quiet) as progress:
        return compile(
            loaded.module,
            loaded.example,
            request.config,
            calibration=calibration,
            verify=verify,
            mixed=request.search,
            target=request.target,
            preprocessing=loaded.preprocessing,
            strict=request.strict,
            batch_size=request.batch_size,
            cache=request.cache,
            progress=progress,
        )


def _precompile(request: CompileRequest, compiled: CompiledModel) -> list[dict[str, Any]]:
    """Compile the artefact's kernels ahead, filling the caches; a row a kernel and architecture."""
    from ouro_compiler.kernels.offline import compile_ahead, parse_architectures
    from ouro_compiler.kernels.plan import plan_launches

    assert request.precompile is not None
    launches = plan_launches(compiled.graph_module, "cuda")
    architectures = parse_architectures(request.precompile)
    rows = []
    with progress_bars(request.quiet) as progress:
        for architecture in architectures:
            for done, launch in enumerate(launches, 1):
                found = dataclasses.asdict(compile_ahead(launch, architecture))
                rows.append({"kernel": launch.spec.label, "digest": launch.spec.digest, **found})
                if progress is not None:
                    progress(f"compiling for sm_{architecture}", done, len(launches))
    return rows


def _dry_run(request: CompileRequest, loaded: LoadedModel) -> None:
    from ouro_compiler.compiler import plan_layers

    rows = plan_layers(loaded.module, loaded.example, request.config, strict=request.strict)
    if request.report is not None:
        from ouro_compiler.report import Report

        write_json(request.report, Report(config=request.config.to_dict(), layers=rows).to_dict())
    if request.quiet:
        return
    from rich.table import Table

    table = Table("layer", "kind", "would be", "weights", "activations", "reason")
    for row in rows:
        bits = [str(one) if one else "-" for one in (row.weight_bits, row.activation_bits)]
        table.add_row(row.name, row.kind, row.status, *bits, row.reason or "")
    print_table(table)


def _print_result(request: CompileRequest, report: dict[str, Any], *, saved: bool) -> None:
    from rich.table import Table

    layers, size, acc = report["layers"], report["bytes"], report["accuracy"]
    table = Table(show_header=False)
    table.add_row(
        "layers quantized",
        f"{layers['quantized']} of {layers['total']} ({layers['simulated']} simulated)",
    )
    for (kind, reason, selected), names in _skipped(layers["rows"]).items():
        label = f"{len(names)} {kind} left in floating point"
        table.add_row(label + (" (REFUSED)" if selected else ""), reason)
    ratio = size["fp16"] / max(1, size["stored"])
    table.add_row(
        "parameters and scales",
        f"{human_bytes(size['fp16'])} in fp16 -> {human_bytes(size['stored'])} ({ratio:.2f}x)",
    )
    made = report["calibration"]["synthesis"]
    how = f", made in {made['iterations']} iterations" if made is not None else ""
    table.add_row("calibration", report["calibration"]["description"] + how)
    snr = report["logits_snr_db"]
    shown = "no difference" if snr is None else f"{snr:.2f} dB"
    table.add_row("SNR of the logits", f"{shown} on {report['snr_data']}")
    table.add_row("outlier share", f"{100 * report['outlier_share']:.2f} % of activations")
    if acc["before"] is not None:
        table.add_row(
            "accuracy",
            f"{100 * acc['before']:.2f} % -> {100 * acc['after']:.2f} % on {report['snr_data']}",
        )
    for label, reason in _references(report["kernels"]):
        table.add_row(label, reason)
    for note in [*report["calibration"]["notes"], *report["notes"]]:
        table.add_row("note", note)
    table.add_row("time", f"{sum(report['seconds'].values()):.1f} s")
    print_table(table)
    print_refined(report["refine"])
    print_mixed(report["mixed"])
    if "precompiled" in report:
        _print_precompiled(report["precompiled"])
    if saved:
        print(request.destination, file=sys.stdout)


def _print_precompiled(rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table("kernel", "for", "compiled in", "registers", "spills", "shared memory")
    for row in rows:
        table.add_row(
            f"{row['kernel']} ({row['digest'][:8]})",
            f"sm_{row['arch']}",
            f"{row['seconds']:.2f} s",
            str(row["registers"]),
            str(row["spills"]),
            f"{row['shared_bytes']} B",
        )
    print_table(table)


def _references(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """What runs a reference or copies operands, a line a reason: (which operators, reason)."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["reason"] is not None:
            found.setdefault((row["kernel"], row["reason"]), []).append(row)
    lines = []
    for (kernel, reason), same in found.items():
        operators = ", ".join(row["op"] for row in same) if len(same) <= 2 else "operators"
        what = "the reference" if kernel == "reference" else kernel
        lines.append((f"{sum(row['nodes'] for row in same)} {operators} run {what}", reason))
    return lines


def _skipped(rows: list[dict[str, Any]]) -> dict[tuple[str, str, bool], list[str]]:
    """Names of skipped layers by (kind, reason, selected)."""
    found: dict[tuple[str, str, bool], list[str]] = {}
    for row in rows:
        if row["status"] == "skipped":
            key = (row["kind"], row["reason"], row["selected"])
            found.setdefault(key, []).append(row["name"])
    return found
