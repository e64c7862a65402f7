"""Every error that a user may meet: one sentence, one way out, one exit code."""

from __future__ import annotations


class EsperError(Exception):
    """An expected failure; `hint` names the remedy, `exit_code` is the command line's."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[type[EsperError], tuple[str, str]]:
        return type(self), (self.message, self.hint)


class RunFailed(EsperError):
    """Training stopped before its last step."""


class StepFailed(RunFailed):
    """A part of the run is lost, hangs or was told to stop; it may be done again from a commit."""


class ConfigError(EsperError, ValueError):
    """A value in the configuration or on the command line cannot be used."""

    exit_code = 2


class NoMatch(ConfigError):
    """A selector entry matches no module of the model."""


class NotPerSample(EsperError, TypeError):
    """What evaluates a model does not return the loss of every sample."""

    exit_code = 2


class StorageUnavailable(EsperError):
    """The storage URL names an unknown scheme, or cannot be read or written."""

    exit_code = 2


class CapabilityError(EsperError):
    """The store lacks what the commit protocol needs: a create that fails if the object exists."""

    exit_code = 2


class CheckpointNotFound(EsperError, ValueError):
    """Nothing is stored where a checkpoint was asked for."""

    exit_code = 3


class RunNotFound(EsperError):
    """No run of that name is at work where it was looked for."""

    exit_code = 3


class CorruptError(EsperError):
    """Stored bytes are missing or are not those that were committed."""

    exit_code = 4


class StoreTimeout(StorageUnavailable):
    """What was stored did not reach the asked durability in time; it may still do so."""


class BackpressureError(EsperError):
    """The store takes checkpoints slower than they are made, and no more fit into memory."""


class TooNewError(CorruptError):
    """A newer version of this program wrote it; this one cannot read it."""


class MigrationError(CorruptError):
    """What an older version stored cannot be brought to the present form."""


class UnsafeInputError(CorruptError):
    """A file asks for more than plain values, so it is not read."""


class SignatureError(CorruptError):
    """A commit is not signed by the key that is configured."""


class FencedError(EsperError):
    """Another writer owns this run's prefix now; this one must stop."""


class ClusterUnavailable(EsperError):
    """The Ray cluster does not answer, or refuses this client."""

    exit_code = 5


class ResourcesTimeout(EsperError):
    """The cluster did not have the needed resources in time."""

    exit_code = 6


class BusError(EsperError):
    """The event bus does not answer, or cannot do what was asked; what it accepted is safe."""

    exit_code = 5


class EventRefused(BusError):
    """No bus takes this event: it is too large, or holds what no reader would take."""

    exit_code = 1


def first_line(error: Exception) -> str:
    """What an error of another library says, as far as it fits into a sentence of ours."""
    return (str(error).splitlines() or [type(error).__name__])[0]
