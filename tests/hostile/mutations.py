"""Stored bytes changed as disks, networks and people change them, without any digest renewed."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

Objects = dict[str, bytes]
"""Every stored object by its path below the root."""


@dataclass(frozen=True, slots=True)
class Aims:
    """What of a whole store matters most.

    `newest`: the manifests that decide what is restored. `spared`: objects that may be absent from
    a whole store too, since nothing names them. `places`: where else a record may be put.
    """

    newest: tuple[str, ...]
    spared: frozenset[str]
    places: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Mutant:
    """New bytes by path, None for a deleted object.

    `forged`: all digests are true, as by somebody who may write there. `legal`: the forged content
    may be what a run could have stored, so that only a signature tells it from one.
    """

    name: str
    changes: dict[str, bytes | None] = field(repr=False)
    forged: bool = False
    legal: bool = False


class Accepted(AssertionError):
    """Damage that nobody was told of."""


Mutation = Callable[[random.Random, Objects, Aims], Mutant]


def _aimed(rng: random.Random, objects: Objects, aims: Aims) -> list[str]:
    """Half of the time what the newest manifests are made of, else every object."""
    if rng.random() < 0.5:
        return sorted(objects)
    newest = rng.choice(aims.newest)
    told = objects[newest].decode()
    return [newest, *(path for path in sorted(objects) if path.rpartition("/")[2] in told)]


def _one(name: str, change: Callable[[random.Random, bytes], bytes]) -> Mutation:
    def mutate(rng: random.Random, objects: Objects, aims: Aims) -> Mutant:
        path = rng.choice(_aimed(rng, objects, aims))
        return Mutant(f"{name} {path}", {path: change(rng, objects[path])})

    return mutate


def flip_bits(rng: random.Random, data: bytes) -> bytes:
    """One to four bits flipped."""
    changed = bytearray(data)
    for at in rng.sample(range(len(data) * 8), rng.randint(1, 4)):
        changed[at // 8] ^= 1 << at % 8
    return bytes(changed)


def _truncated(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.choice([0, 1, len(data) - 1, rng.randrange(len(data))])]


def _extended(rng: random.Random, data: bytes) -> bytes:
    more = rng.choice([b"\n", b" ", b"\0", b"{}", data, rng.randbytes(rng.randint(1, 4096))])
    return rng.choice([data + more, more + data])


def _zeroed(rng: random.Random, data: bytes) -> bytes:
    start = rng.randrange(len(data))
    changed = bytearray(data)
    changed[start:] = bytes(len(data) - start)
    return bytes(changed) if bytes(changed) != data else b""


def _moved_block(rng: random.Random, data: bytes) -> bytes:
    """A block of 512 bytes from elsewhere in the same object, as a mixed-up disk write."""
    block = min(512, len(data) // 2)
    source, target = (rng.randrange(len(data) - block + 1) for _ in range(2))
    changed = data[:target] + data[source : source + block] + data[target + block :]
    return changed if changed != data else flip_bits(rng, data)


def _overwritten(rng: random.Random, data: bytes) -> bytes:
    return rng.randbytes(rng.randint(1, 2 * len(data)))


def _swapped(rng: random.Random, objects: Objects, aims: Aims) -> Mutant:
    """Two objects in each other's place."""
    one = rng.choice(sorted(objects))
    other = rng.choice([path for path in sorted(objects) if objects[path] != objects[one]])
    return Mutant(f"swap {one} {other}", {one: objects[other], other: objects[one]})


def _copied(rng: random.Random, objects: Objects, aims: Aims) -> Mutant:
    """One object in the place of another of its kind."""
    target = rng.choice(sorted(objects))
    folder = target.partition("/")[0]
    kin = [p for p in sorted(objects) if p.startswith(folder) and objects[p] != objects[target]]
    source = rng.choice(kin or [p for p in sorted(objects) if objects[p] != objects[target]])
    return Mutant(f"copy {source} over {target}", {target: objects[source]})


def _deleted(rng: random.Random, objects: Objects, aims: Aims) -> Mutant:
    """Any object that a whole store must have."""
    path = rng.choice(sorted(objects.keys() - aims.spared))
    return Mutant(f"delete {path}", {path: None})


def _added(rng: random.Random, objects: Objects, aims: Aims) -> Mutant:
    """A record under a number of its own: rubbish, or a copy of another."""
    newest = rng.choice(aims.newest)
    folder, _, file = newest.rpartition("/")
    data = rng.choice([b"", b"{}", rng.randbytes(100), objects[newest]])
    after, last = f"{int(file[:20]) + 1:020d}", "9" * 20
    path = rng.choice(
        [
            f"{folder}/{after}.json",
            f"{folder}/{after}.json",
            f"{folder}/{last}.json",
            f"gc/{rng.choice([after, last])}.json",
            f"epochs/{rng.choice(['00000009', '99999999'])}.json",
            *aims.places,
        ]
    )
    return Mutant(f"add {path}", {path: data})


MUTATIONS: tuple[Mutation, ...] = (
    _one("flip", flip_bits),
    _one("flip", flip_bits),
    _one("flip", flip_bits),
    _one("truncate", _truncated),
    _one("extend", _extended),
    _one("zero", _zeroed),
    _one("move a block of", _moved_block),
    _one("overwrite", _overwritten),
    _swapped,
    _copied,
    _deleted,
    _added,
)


def mutant(rng: random.Random, objects: Objects, aims: Aims) -> Mutant:
    """One damaged store."""
    return rng.choice(MUTATIONS)(rng, objects, aims)
