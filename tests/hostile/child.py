"""Reads many damaged stores in one process of bounded memory, and says what became of each.

Argument: a JSON list of jobs, see `Job`. One line of JSON for each store goes out before it is
read and one for each job after, so that a crash has a name.
"""

from __future__ import annotations

import collections
import json
import random
import resource
import sys
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from tests.hostile.judge_layers import StoredLayer
from tests.hostile.judge_runs import StoredRun
from tests.hostile.mutations import Mutant, Objects

Kind = type[StoredRun] | type[StoredLayer]
KINDS: Final[Mapping[str, Kind]] = {"run": StoredRun, "layer": StoredLayer}
ADDRESS_SPACE = 2**30
"""Bytes that the process may ask for beyond what it has when it begins."""


@dataclass(frozen=True, slots=True)
class Job:
    """Damaged stores `first` up to `last` of a seed, made of a whole one of a kind in a folder."""

    kind: str
    folder: str
    tables: str
    seed: int
    first: int
    last: int
    storage: Mapping[str, Any] = field(default_factory=dict)


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
        """Undo the damage, and what the next writers have recorded."""
        for path in mutant.changes:
            self._write(path, self._objects.get(path))
        for folder in ("epochs", "layers"):
            for record in (self._folder / folder).rglob("*.json"):
                if record.relative_to(self._folder).as_posix() not in self._objects:
                    record.unlink()

    def _write(self, path: str, data: bytes | None) -> None:
        file = self._folder / path
        if data is None:
            file.unlink(missing_ok=True)
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)


def peak_bytes() -> int:
    """The most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _fast() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def limit_memory() -> None:
    """Let this process ask for ADDRESS_SPACE bytes more than it has, and never for more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def run(job: Job) -> dict[str, Any]:
    """How many stores of a job had which outcome, and by how many bytes the process has grown."""
    tables = {path.stem: path.read_bytes() for path in Path(job.tables).glob("*.bin")}
    whole = KINDS[job.kind].learn(Path(job.folder), _fast(), job.storage)
    outcomes: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory(dir=_fast()) as scratch:
        place = Place(Path(scratch), whole.objects)
        before = peak_bytes()
        for number in range(job.first, job.last):
            rng = random.Random(f"{job.seed}/{number}")
            mutant = whole.draw(rng, number % 3 == 0, tables)
            print(json.dumps({"number": number, "store": mutant.name}), flush=True)
            place.put(mutant)
            outcomes[whole.judge(Path(scratch), mutant)] += 1
            place.heal(mutant)
        return {"outcomes": outcomes, "grown": peak_bytes() - before}


def main() -> None:
    """See the module."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    limit_memory()
    for job in json.loads(sys.argv[1]):
        print(json.dumps(run(Job(**job))), flush=True)


if __name__ == "__main__":
    main()
