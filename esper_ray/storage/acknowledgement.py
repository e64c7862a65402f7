"""How far a save has come, the promise of it, and what a seed's checkpoint is called."""

from __future__ import annotations

import re
import threading
from typing import Final, Literal

from esper_ray.errors import CheckpointNotFound, ConfigError, StoreTimeout

Durability = Literal["accepted", "durable-local", "durable-object"]

LEVELS: Final[tuple[Durability, ...]] = ("accepted", "durable-local", "durable-object")

_ID = re.compile(r"([0-9a-f]{16})-([0-9]{1,10})-([0-9]{1,8})-([0-9]{1,18})-([0-9]{1,10})")


class SaveFuture:
    """A save under way: accepted at once, then durable level by level, or failed."""

    def __init__(self, highest: Durability) -> None:
        self._highest, self._level = highest, LEVELS[0]
        self._error: Exception | None = None
        self._changed = threading.Condition()

    @property
    def level(self) -> Durability:
        """The highest level that has been reached."""
        return self._level

    def exception(self) -> Exception | None:
        """Why the save failed, None if it did not, or has not yet."""
        return self._error

    def done(self) -> bool:
        """Whether it has reached its highest level or failed."""
        return self._error is not None or self._level == self._highest

    def wait(self, level: Durability | None = None, timeout: float | None = None) -> Durability:
        """Return once `level`, the highest by default, is reached; raise what the save raised.

        `timeout` in seconds; StoreTimeout when it is over, ConfigError for a level that this
        store does not have.
        """
        wanted = self._highest if level is None else check_level(level, self._highest)
        rank = LEVELS.index(wanted)
        with self._changed:
            self._changed.wait_for(
                lambda: self._error is not None or LEVELS.index(self._level) >= rank, timeout
            )
            if LEVELS.index(self._level) >= rank:
                return self._level
            if self._error is not None:
                raise self._error
        raise StoreTimeout(
            f"a save is {self._level} and not {wanted} after {timeout} s",
            "wait longer, or look whether the store answers",
        )

    def reach(self, level: Durability) -> None:
        """Note that a level is reached; called by the writer only."""
        with self._changed:
            if LEVELS.index(level) > LEVELS.index(self._level):
                self._level = level
            self._changed.notify_all()

    def fail(self, error: Exception) -> None:
        """Note that no further level will be reached; called by the writer only."""
        with self._changed:
            self._error = error
            self._changed.notify_all()


def check_level(level: str, highest: Durability) -> Durability:
    """The level of that name; ConfigError if there is none such up to `highest`."""
    offered = LEVELS[: LEVELS.index(highest) + 1]
    for known in offered:
        if known == level:
            return known
    raise ConfigError(
        f"{level!r} is no durability that this store reaches", f"choose from {', '.join(offered)}"
    )


class CheckpointId(str):
    """`{layer_key}-{seed_id}-{run_epoch}-{seq}-{event_no}`, and the save it stands for.

    `future` is that of the save that returned this id, None for an id that was read or parsed.
    """

    __slots__ = ("event_no", "future", "layer_key", "run_epoch", "seed_id", "seq")

    layer_key: str
    seed_id: int
    run_epoch: int
    seq: int
    event_no: int
    future: SaveFuture | None

    def __new__(cls, text: str, future: SaveFuture | None = None) -> CheckpointId:
        """Parse an id; CheckpointNotFound, a ValueError, if no checkpoint can have it."""
        match = _ID.fullmatch(text)
        if match is None:
            raise CheckpointNotFound(
                f"Checkpoint not found: {text!r} is no checkpoint id",
                "pass what save_checkpoint returned",
            )
        self = super().__new__(cls, text)
        self.layer_key, self.future = match[1], future
        self.seed_id, self.run_epoch, self.seq, self.event_no = map(int, match.groups()[1:])
        return self

    @classmethod
    def of(
        cls, key: str, seed_id: int, run_epoch: int, seq: int, event_no: int, future: SaveFuture
    ) -> CheckpointId:
        """The id of one saved row."""
        return cls(f"{key}-{seed_id}-{run_epoch}-{seq}-{event_no}", future)

    def __reduce__(self) -> tuple[type[CheckpointId], tuple[str]]:
        return type(self), (str(self),)
