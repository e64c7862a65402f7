"""What must become of a damaged run: refused, resumed from redundancy, never taken."""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from esper_ray import explain
from esper_ray.actors import persistence
from esper_ray.errors import EsperError
from esper_ray.storage import Root, RunCheckpoints, RunLog, SigningKey
from tests.hostile import forgeries, mutations
from tests.hostile.mutations import Accepted, Aims, Mutant, Objects
from tests.hostile.stored_run import commits, read_objects, resume


@dataclass(frozen=True, slots=True)
class StoredRun:
    """A whole run, and what it gives back by commit."""

    objects: Objects
    storage: Mapping[str, Any]
    newest: int
    content: Mapping[int, str]

    @classmethod
    def learn(cls, folder: Path, scratch: str | None, storage: Mapping[str, Any]) -> Self:
        """Resume every commit of the whole store."""
        objects = read_objects(folder)
        content = {}
        for path in commits(objects):
            with tempfile.TemporaryDirectory(dir=scratch) as copy:
                place = Path(copy) / "run"
                shutil.copytree(folder, place)
                body = RunLog(Root.open(str(place))).read_commit(int(path[8:28]))
                seq, _, content[body["seq"]] = resume(place, f"step={body['step']}", **storage)
                assert seq == body["seq"]
        return cls(objects, storage, max(content), content)

    def draw(self, rng: random.Random, forged: bool, tables: dict[str, bytes]) -> Mutant:
        """A damaged run, by accident or by intent."""
        if forged:
            return forgeries.mutant(rng, self.objects, tables)
        every = commits(self.objects)  # a lost one leaves what pruning it would leave
        return mutations.mutant(rng, self.objects, Aims((every[0],), frozenset(every)))

    def judge(self, place: Path, mutant: Mutant) -> str:
        """What became of a damaged run; Accepted where the damage went unnoticed.

        Any error that is not ours goes through.
        """
        damage = _problems(place, **self.storage)
        if mutant.forged:
            _look(place)
        if not damage and not mutant.forged:
            raise Accepted(f"verify does not see it: {mutant.name}")
        try:
            seq, told, content = resume(place, **self.storage)
        except EsperError as error:
            return f"refused: {type(error).__name__}"
        if seq is None:
            raise Accepted(f"a fresh run was started: {mutant.name}")
        legal = mutant.legal and not self.storage  # only a signature tells
        if seq == self.newest and content == self.content[seq]:
            if damage:
                return "found by verify, not on the way"
            if legal:
                return "legal: nothing restored differs"
        elif told and seq in self.content and content == self.content[seq]:
            return "restored from what was before"
        if legal:
            return "legal: another content"
        raise Accepted(f"commit {seq} was resumed with {told}: {mutant.name}")


def _problems(place: Path, signing_key_file: str = "") -> list[str]:
    key = SigningKey(Path(signing_key_file).read_bytes()) if signing_key_file else None
    try:
        problems = RunCheckpoints(RunLog(Root.open(str(place)), key=key)).verify()
    except EsperError as error:
        return [str(error)]
    return [str(found) for found in problems if found["severity"] == "damage"]


def _look(place: Path) -> None:
    """Everything else that reads a store."""
    log = RunLog(Root.open(str(place)))
    for read in (
        lambda: RunCheckpoints(log).rows(),
        lambda: persistence.read_losses(log),
        lambda: explain.explain(log, "reader.hidden", 0),
    ):
        try:
            read()
        except EsperError:
            continue
