"""Where a command's model comes from: a file, or a function of the user's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ouro_compiler.errors import UsageError

if TYPE_CHECKING:
    from ouro_compiler.frontend.checkpoint import LoadedModel


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model as the command line names it: a file, or `package.module:function`."""

    name: str
    arch: str | None = None
    ema: bool = False
    arguments: tuple[str, ...] = ()
    checkpoint: Path | None = None
    input_shape: str | None = None
    allow_pickle: bool = False

    @property
    def stem(self) -> str:
        """What files made from it are called."""
        if self.is_factory:
            return self.name.replace(":", ".").rpartition(".")[2]
        return Path(self.name).stem

    @property
    def is_factory(self) -> bool:
        """Is it a function, and no file?"""
        from ouro_compiler.frontend.factory import is_factory

        return is_factory(self.name)

    def load(self) -> LoadedModel:
        """Read or build it, with stand-ins for extensions that its code imports and are missing.

        Raises OuroError subclasses.
        """
        from ouro_compiler.frontend.standins import install_standins

        install_standins()
        if self.is_factory:
            from ouro_compiler.frontend.factory import load_factory

            if self.arch is not None or self.ema:
                raise UsageError("--arch and --ema are for checkpoints, not for a function")
            return load_factory(
                self.name,
                arguments=self.arguments,
                checkpoint=self.checkpoint,
                input_shape=self.input_shape,
                allow_pickle=self.allow_pickle,
            )
        from ouro_compiler.frontend.checkpoint import load_model

        if self.arguments or self.checkpoint is not None or self.input_shape is not None:
            raise UsageError(
                "--model-arg, --checkpoint and --input-shape are for package.module:function; "
                f"{self.name} is a file"
            )
        return load_model(
            Path(self.name), arch=self.arch, ema=self.ema, allow_pickle=self.allow_pickle
        )
