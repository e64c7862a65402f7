"""Reads many damaged stores in one process of bounded memory, and says what became of each.

Arguments: folder of the whole store, folder of hostile tables, seed, first and last number. One
line of JSON for each store goes out before it is read and one after, so that a crash has a name.
"""

from __future__ import annotations

import collections
import json
import random
import resource
import shutil
import sys
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from esper_ray import explain
from esper_ray.actors import persistence
from esper_ray.errors import EsperError
from esper_ray.storage import Root, RunCheckpoints, RunLog, SigningKey
from tests.hostile import forgeries, mutations
from tests.hostile.mutations import Mutant
from tests.hostile.stored_run import Objects, commits, read_objects, resume

ADDRESS_SPACE = 2**30
"""Bytes that the process may ask for beyond what it has when the first store is read."""


@dataclass(frozen=True, slots=True)
class Whole:
    """What the undamaged store gives back, by commit."""

    objects: Objects
    newest: int
    content: Mapping[int, str]


class Accepted(AssertionError):
    """Damage that nobody was told of."""


def learn(folder: Path, **storage: Any) -> Whole:
    """Resume every commit of the whole store."""
    objects = read_objects(folder)
    content = {}
    with tempfile.TemporaryDirectory(dir=_fast()) as scratch:
        for path in commits(objects):
            place = Path(scratch) / "run"
            shutil.copytree(folder, place)
            body = RunLog(Root.open(str(place))).read_commit(int(path[8:28]))
            seq, _, content[body["seq"]] = resume(place, f"step={body['step']}", **storage)
            assert seq == body["seq"]
            shutil.rmtree(place)
    return Whole(objects, max(content), content)


def judge(place: Path, whole: Whole, mutant: Mutant, **storage: Any) -> str:
    """What became of a store: "refused", "restored", "found by verify" or "legal".

    Accepted where the damage went unnoticed; any error that is not ours goes through.
    """
    damage = _problems(place, **storage)
    if mutant.forged:
        _look(place)
    if not damage and not mutant.forged:
        raise Accepted(f"verify does not see it: {mutant.name}")
    try:
        seq, told, content = resume(place, **storage)
    except EsperError as error:
        return f"refused: {type(error).__name__}"
    if seq is None:
        raise Accepted(f"a fresh run was started: {mutant.name}")
    if seq == whole.newest and content == whole.content[seq]:
        if damage:
            return "found by verify, not on the way"
        if mutant.legal and not storage:
            return "legal: nothing restored differs"
    elif told and seq in whole.content and content == whole.content[seq]:
        return "restored from the commit before"
    if mutant.legal and not storage:
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


class Place:
    """A copy of the whole store, damaged and made whole again."""

    def __init__(self, folder: Path, objects: Objects) -> None:
        self._folder, self._objects = folder, objects
        for path, data in objects.items():
            self._write(path, data)

    def put(self, mutant: Mutant) -> None:
        """Damage it."""
        for path, data in mutant.changes.items():
            self._write(path, data)

    def heal(self, mutant: Mutant) -> None:
        """Undo the damage, and the start that a resumed run has recorded."""
        for path in mutant.changes:
            self._write(path, self._objects.get(path))
        for record in (self._folder / "epochs").iterdir():
            if f"epochs/{record.name}" not in self._objects:
                record.unlink()

    def _write(self, path: str, data: bytes | None) -> None:
        file = self._folder / path
        if data is None:
            file.unlink(missing_ok=True)
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)


def draw(seed: int, number: int, objects: Objects, tables: dict[str, bytes]) -> Mutant:
    """The damaged store of a number: two of three by accident, the third by intent."""
    rng = random.Random(f"{seed}/{number}")
    if number % 3:
        return mutations.mutant(rng, objects)
    return forgeries.mutant(rng, objects, tables)


def peak_bytes() -> int:
    """The most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _fast() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def _limit() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def main() -> None:
    """See the module."""
    folder, payloads = Path(sys.argv[1]), Path(sys.argv[2])
    seed, first, last = (int(word) for word in sys.argv[3:6])
    storage: dict[str, Any] = json.loads(sys.argv[6]) if len(sys.argv) > 6 else {}
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    tables = {path.stem: path.read_bytes() for path in payloads.glob("*.bin")}
    whole = learn(folder, **storage)
    outcomes: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory(dir=_fast()) as scratch:
        place = Place(Path(scratch), whole.objects)
        _limit()
        before = peak_bytes()
        for number in range(first, last):
            mutant = draw(seed, number, whole.objects, tables)
            print(json.dumps({"number": number, "store": mutant.name}), flush=True)
            place.put(mutant)
            outcomes[judge(Path(scratch), whole, mutant, **storage)] += 1
            place.heal(mutant)
        print(json.dumps({"outcomes": outcomes, "grown": peak_bytes() - before}), flush=True)


if __name__ == "__main__":
    main()
