"""What can go wrong for a user, a class a kind, each with the exit code of the command line."""

from __future__ import annotations


class OuroError(Exception):
    """Base class: one sentence that says what was wrong and what to do."""

    exit_code = 1


class UsageError(OuroError):
    """Arguments, configuration or data that cannot be used."""

    exit_code = 2


class ModelError(OuroError):
    """A model or artefact that is missing, unreadable, unsafe to open or cannot be traced."""

    exit_code = 3


class RefusedLayerError(OuroError):
    """Under `--strict`: a layer that the recipe selected stays in floating point."""

    exit_code = 4


class VerificationError(OuroError):
    """Accuracy fell further than allowed, or an output is not finite."""

    exit_code = 5


class DeviceError(OuroError):
    """The device that was asked for is not on this machine."""

    exit_code = 6


class CacheError(OuroError):
    """The cache of generated code cannot be used safely."""

    exit_code = 2
