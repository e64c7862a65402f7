"""What must become of a damaged layer: refused, restored from the step before, never taken."""

from __future__ import annotations

import contextlib
import random
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from esper_ray.errors import EsperError
from esper_ray.storage import CheckpointManager, Root, Rows, RunCheckpoints, RunLog
from tests.hostile import layer_forgeries, mutations, stored_layer
from tests.hostile.mutations import Accepted, Mutant, Objects
from tests.hostile.stored_layer import LAYER, SHARDS, Known, digest_of, digest_of_record, inner
from tests.hostile.stored_run import read_objects

SAME, BEFORE, OTHER = "same", "restored from what was before", "another content"


@dataclass(frozen=True, slots=True)
class StoredLayer:
    """A whole stored layer, and what it gives back: by step, by pins, in pieces, by seed."""

    folder: Path
    objects: Objects
    known: Known
    pieces: Mapping[str, int]
    """Steps by the digest of what a read in pieces gives."""
    seeds: Mapping[str, str]

    @classmethod
    def learn(cls, folder: Path, _scratch: str | None, _storage: Mapping[str, Any]) -> Self:
        """Read all of the whole store; it must be what its maker has stored."""
        known, manager = Known.read(folder), CheckpointManager(str(folder), layer_id=LAYER)
        for step, digest in known.steps.items():
            assert digest_of(manager.restore_layer(step)) == digest
        pieces = {digest_of(manager.restore_layer(step, inner())): step for step in known.steps}
        seeds = {
            saved: digest_of_record(manager.restore_checkpoint(saved, "cpu")) for saved in known.ids
        }
        return cls(folder, read_objects(folder), known, pieces, seeds)

    def draw(self, rng: random.Random, forged: bool, tables: dict[str, bytes]) -> Mutant:
        """A damaged layer, by accident or by intent."""
        if forged:
            return layer_forgeries.mutant(rng, self.objects, tables)
        return mutations.mutant(rng, self.objects, stored_layer.aims(self.objects))

    def judge(self, place: Path, mutant: Mutant) -> str:
        """What became of a damaged layer; Accepted where the damage went unnoticed.

        Any error that is not ours goes through.
        """
        damage = _problems(place)
        if not damage and not mutant.forged:
            raise Accepted(f"verify does not see it: {mutant.name}")
        found = [self._outcome(read, mutant) for read in self._reads(place)]
        if not mutant.forged:
            self._heal(place)
        _go_on(place, zlib.crc32(mutant.name.encode()) % SHARDS[-1])
        if found[0] == BEFORE:
            return BEFORE
        if OTHER in found:
            return f"legal: {OTHER}"
        refused = [one for one in found if one.startswith("refused")]
        if refused:
            return refused[0]
        if damage:
            return "found by verify, not on the way"
        if mutant.legal:
            return "legal: nothing restored differs"
        raise Accepted(f"nobody sees it: {mutant.name}")

    def _heal(self, place: Path) -> None:
        """With a whole copy nearby nothing is lost."""
        manager = CheckpointManager(str(place), layer_id=LAYER, local_root=str(self.folder))
        last = self.known.steps[max(self.known.steps)]
        assert digest_of(manager.restore_layer()) == last
        for saved, digest in self.seeds.items():
            assert digest_of_record(manager.restore_checkpoint(saved, "cpu")) == digest

    def _outcome(self, read: Callable[[], str], mutant: Mutant) -> str:
        try:
            outcome = read()
        except EsperError as error:
            return f"refused: {type(error).__name__}"
        if outcome.startswith(OTHER) and not mutant.legal:
            raise Accepted(f"{outcome}: {mutant.name}")
        return outcome.partition(":")[0]

    def _reads(self, place: Path) -> list[Callable[[], str]]:
        whole, some = (CheckpointManager(str(place), layer_id=LAYER) for _ in range(2))
        last = max(self.known.steps)
        steps = {digest: step for step, digest in self.known.steps.items()}
        pinned = [self.known.steps[step] for step in (2, last)]  # of the two run epochs
        return [
            lambda: _newest(whole.restore_layer, steps, last),
            lambda: _newest(lambda: some.restore_layer(seed_ids=inner()), self.pieces, last),
            lambda: _exact(whole.restore_layer(step=3), self.known.steps[3]),
            *(
                # Bound to their digest, pins tell even what only its writer could know better.
                lambda pins=pins, digest=digest: _pinned(whole.restore_layer(pins=pins), digest)
                for pins, digest in zip(self.known.pins, pinned, strict=True)
            ),
            *(
                lambda saved=saved, digest=digest: _seed(some, saved, digest)
                for saved, digest in self.seeds.items()
            ),
        ]


def _newest(restore: Callable[[], Rows], steps: Mapping[str, int], last: int) -> str:
    with stored_layer.told() as messages:
        rows = restore()
    found = steps.get(digest_of(rows))
    if found == last:
        return SAME
    if found is not None and messages:
        return BEFORE
    stored_layer.use(rows)
    return f"{OTHER}: step {found} with {messages}"


def _exact(rows: Rows, digest: str) -> str:
    if digest_of(rows) == digest:
        return SAME
    stored_layer.use(rows)
    return f"{OTHER}: of a named step"


def _pinned(rows: Rows, digest: str) -> str:
    if digest_of(rows) != digest:
        raise Accepted("pins gave another content")
    return SAME


def _seed(manager: CheckpointManager, saved: str, digest: str) -> str:
    found = digest_of_record(manager.restore_checkpoint(saved, "cpu"))
    return SAME if found == digest else f"{OTHER}: of {saved}"


def _go_on(place: Path, index: int) -> None:
    """The next writer opens a shard, or is refused."""
    with contextlib.suppress(EsperError):
        stored_layer.open_shard(place, len(SHARDS), index).close()


def _problems(place: Path) -> list[str]:
    try:
        problems = RunCheckpoints(RunLog(Root.open(str(place)))).verify()
    except EsperError as error:
        return [str(error)]
    return [str(found) for found in problems if found["severity"] == "damage"]
