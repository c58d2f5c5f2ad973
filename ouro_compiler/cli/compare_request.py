"""What `ouro compare` is asked: its options, and the runs that they come to."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ouro_compiler.cli.calibration import check_calibration
from ouro_compiler.cli.source import ModelSource
from ouro_compiler.config import PRESETS, QuantConfig
from ouro_compiler.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class CompareRequest:
    """The command's options, as given."""

    source: ModelSource
    data: str
    recipes: str
    bits: str
    seeds: str
    settings: tuple[str, ...]
    calibration: str | None
    images: int
    iterations: int | None
    cache: bool
    eval_images: int | None
    json: Path | None
    csv: Path | None
    markdown: Path | None
    plot: Path | None
    resume: bool
    batch_size: int
    device: str
    quiet: bool


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One run: a recipe as it was written, a preset and a seed, and what they come to."""

    recipe: str
    bits: str
    seed: int
    config: QuantConfig

    @property
    def key(self) -> dict[str, Any]:
        """What a row is told by."""
        return {"recipe": self.recipe, "bits": self.bits, "seed": self.seed}


def variants(request: CompareRequest) -> list[Variant]:
    """Every run that is asked for, in order. Raises UsageError for what does not exist."""
    found = [
        Variant(recipe=entry, bits=bits, seed=seed, config=_config(request, entry, bits, seed))
        for bits in _listed("--bits", request.bits)
        for entry in _listed("--recipes", request.recipes)
        for seed in _seeds(request.seeds)
    ]
    return list({tuple(one.key.values()): one for one in found}.values())


def _config(request: CompareRequest, entry: str, bits: str, seed: int) -> QuantConfig:
    from ouro_compiler.recipes import find_recipe

    name, *settings = entry.split(":")
    find_recipe(name)
    if bits not in PRESETS:
        raise UsageError(f"no preset is called {bits!r}: the presets are {', '.join(PRESETS)}")
    config = PRESETS[bits]
    for setting in (*request.settings, *settings):
        if setting.partition("=")[0].strip() in ("recipe", "seed"):
            raise UsageError(f"{setting}: --recipes and --seeds say that")
        config = config.with_setting(setting)
    return replace(config, recipe=name, seed=seed)


def _listed(option: str, text: str) -> list[str]:
    found = [one.strip() for one in text.split(",") if one.strip()]
    if not found:
        raise UsageError(f"{option} needs at least one name")
    return found


def _seeds(text: str) -> list[int]:
    try:
        return [int(one) for one in _listed("--seeds", text)]
    except ValueError:
        raise UsageError(f"--seeds takes whole numbers with commas, got {text!r}") from None


def check_request(request: CompareRequest) -> None:
    """Refuse before any work what cannot end well."""
    check_calibration(request.calibration, request.iterations)
    if request.resume and request.json is None:
        raise UsageError("--resume needs --json FILE, whose runs it keeps")
    written = [(name, getattr(request, name)) for name in ("json", "csv", "markdown", "plot")]
    for name, path in written:
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise UsageError(f"--{name} {path}: not a file in an existing folder")
    paths = [path.absolute() for _, path in written if path is not None]
    if len(set(paths)) < len(paths):
        raise UsageError("two outputs have the same name: give each a file of its own")
