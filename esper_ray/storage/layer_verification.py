"""A check of the logs of all layers: each manifest, its place, its parents and what it names."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

from esper_ray.errors import CorruptError
from esper_ray.storage import manifest
from esper_ray.storage.filesystem import Root
from esper_ray.storage.manifest import SegmentRef
from esper_ray.storage.problems import Problem, damage
from esper_ray.storage.reachability import layer_manifests

_PARENT = {"run_epoch": int, "shard": int, "seq": int, "sha256": str}


def verify_layers(root: Root, refs: dict[str, SegmentRef]) -> Iterator[Problem]:
    """Report damaged manifests and broken chains; add to `refs` what the whole ones name."""
    digests: dict[str, str] = {}
    parents: dict[str, dict[str, str]] = {}
    for path in layer_manifests(root):
        try:
            data = root.read(path, manifest.MAX_BYTES)
            digests[path] = hashlib.sha256(data).hexdigest()
            body = manifest.decode(data)
            parents[path] = _parents(path, body)
            segments = manifest.segments(body)
        except CorruptError as error:
            yield damage(path, error)
            continue
        for ref in segments:
            if refs.setdefault(ref.path, ref).size != ref.size:
                yield damage(path, f"names {ref.path} with another size")
    for path, named in parents.items():
        for parent, digest in named.items():
            if parent not in digests:
                yield damage(parent, f"missing, the parent of {path}")
            elif digests[parent] != digest:
                yield damage(parent, f"is not the parent that {path} names")


def _parents(path: str, body: Mapping[str, Any]) -> dict[str, str]:
    """Paths and sha256 of the parents of a manifest that must itself belong where it lies."""
    _, key, epoch, shard, file = path.split("/")
    where = {"layer_key": key, "run_epoch": int(epoch[1:]), "seq": int(file.partition(".")[0])}
    own = {name: body.get(name) for name in where}
    index = body["shard"].get("index") if isinstance(body.get("shard"), dict) else None
    if own != where or index != int(shard[1:]):
        raise CorruptError("it is the manifest of another place")
    listed = body.get("parent")
    if not isinstance(listed, list):
        raise CorruptError("it has no list of parents")
    return dict(_parent(key, value) for value in listed)


def _parent(key: str, value: object) -> tuple[str, str]:
    if not isinstance(value, dict) or value.keys() != _PARENT.keys():
        raise CorruptError("one of its parents is malformed")
    if any(type(value[name]) is not kind for name, kind in _PARENT.items()):
        raise CorruptError("one of its parents is malformed")
    folder = f"layers/{key}/e{value['run_epoch']:08d}/s{value['shard']:04d}"
    return f"{folder}/{value['seq']:020d}.json", str(value["sha256"])
