"""Every error that metis_home raises on purpose, one type per thing a user can mend.

Each is also the built-in error that callers already catch (`ValueError`, `RuntimeError` ...).
No imports: this file is also loaded by commands that must start without torch.
"""


class MetisHomeError(Exception):
    """Base of all errors of this package. The message says what is wrong, what was found and what to do."""


class ConfigError(MetisHomeError, ValueError):
    """A model configuration has a missing, unknown or impossible field."""


class BranchError(MetisHomeError, ValueError):
    """A branch was asked for in a way that names no branch (unknown value, wrong shape, out of range)."""


class CacheBranchError(BranchError):
    """A key-value cache that one branch filled was handed to the other branch."""


class CheckpointError(MetisHomeError, ValueError):
    """A checkpoint directory cannot be used: wrong kind, missing or broken files, tensors that do not fit."""


class ProcessorError(MetisHomeError, ValueError):
    """Messages, images or videos cannot be turned into model inputs."""


class UnsupportedError(MetisHomeError, NotImplementedError):
    """The request is well formed, but this model cannot do it; the message names what to do instead."""


class BackendError(MetisHomeError, RuntimeError):
    """A compute backend was asked for that is unknown or cannot run here."""


class VerificationError(CheckpointError):
    """A converted checkpoint does not hold what it was made from; the message names the first difference."""


class OutputError(MetisHomeError, OSError):
    """An output directory cannot be written: it exists, is in use, is read-only, or the disk is full."""


class DataError(MetisHomeError, ValueError):
    """Rows of a data set cannot be used; the message lists each by number, with the reason."""


class RecipeError(ConfigError):
    """A training recipe has an unknown, missing or impossible setting."""


class TrainingError(MetisHomeError, RuntimeError):
    """Training cannot start or go on: a loss that is no number, nothing to train, a state that does not fit."""


class RewardError(MetisHomeError, ValueError):
    """A reward function returned something else than one number or None per completion."""


class SandboxError(MetisHomeError, RuntimeError):
    """Untrusted code cannot be run safely here; the message names what is missing."""


class EngineError(MetisHomeError, RuntimeError):
    """A generation engine or an endpoint did not do what was asked: unreachable, timed out, wrong reply."""
