"""A small real run as the runtime stores it, in memory as bytes by path, and sealed again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from esper_ray.actors.engines import LocalEngine
from esper_ray.config import RunConfig, parse_config
from esper_ray.growth import snapshot
from esper_ray.growth.stage import Stage
from esper_ray.runtime import Runtime
from tests.hostile.mutations import Objects

EPOCHS = (8, 12)
"""Epochs of the first start of the run and of the second, which resumes it."""


def run_config(folder: Path, epochs: int = EPOCHS[-1], **storage: Any) -> RunConfig:
    """Two layers of four seeds, which are half blended in when it ends."""
    return parse_config(
        {
            "run": "hostile",
            "seed": 3,
            "data": {
                "args": {"cap_bytes": 60_000},
                "batch_size": 32,
                "evaluation_samples": 64,
            },
            "model": {"args": {"embedding": 8, "hidden": 16}},
            "train": {"epochs": epochs, "lr": 4e-3},
            "seeds": {
                "targets": ["*.hidden"],
                "epoch_steps": 2,
                "blueprint": "bottleneck",
                "hidden": 4,
                "grafting": {"strategy": "linear", "ramp_epochs": 12},
            },
            "lifecycle": {
                "germinate_after": 2,
                "minimum_epochs": {"TRAINING": 2, "GRAFTING": 2},
                "gates": {"alpha_one_loss_ratio_max": 5.0, "delta_ratio_max": 5.0},
            },
            "storage": {"url": str(folder), "every_epochs": 4, **storage},
        }
    )


def make_run(folder: Path, **storage: Any) -> None:
    """Store the run: two starts, the second resumed from the first."""
    for epochs in EPOCHS:
        with Runtime(run_config(folder, epochs, **storage), local=True) as runtime:
            runtime.fit()


def resume(
    folder: Path, selector: str = "auto", **storage: Any
) -> tuple[int | None, list[str], str]:
    """Resume the run like `esper-ray train`: the commit, the warnings, a digest of all restored."""
    warnings: list[str] = []
    config = run_config(folder, **storage)
    with Runtime(config, local=True, warn=warnings.append) as runtime:
        found = runtime.open(selector if selector == "auto" else f"{folder}@{selector}")
        engine = runtime._engine
        assert isinstance(engine, LocalEngine)
        digest = hashlib.sha256(repr(engine._coordinator._progress).encode())
        for stage in engine._pipeline.stages:
            for part in _parts(stage):
                digest.update(part)
    return (found.seq if found else None), warnings, digest.hexdigest()


def _parts(stage: Stage) -> Iterator[bytes]:
    yield str(stage.step).encode()
    yield from _bytes(snapshot.host_tensors(stage))
    for trainer in stage.trainers.values():
        yield from _bytes(snapshot.state_columns(trainer.layer.state))
        yield from _bytes(snapshot.grafting_columns(trainer.layer.state))
        yield from _bytes(snapshot.grown_tensors(trainer.layer))
        yield from _bytes(snapshot.rollback_tensors(trainer.layer))


def _bytes(named: Mapping[str, Any]) -> Iterator[bytes]:
    for name in sorted(named):
        value = named[name]
        array = value.contiguous().numpy() if isinstance(value, torch.Tensor) else value
        yield f"{name} {array.dtype} {array.shape}".encode()
        yield np.ascontiguousarray(array).tobytes()


def read_objects(folder: Path) -> Objects:
    """Every stored object by its path below the root."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def commits(objects: Objects) -> list[str]:
    """Paths of the commits, newest first."""
    return sorted((path for path in objects if path.startswith("commits/")), reverse=True)


def body_of(data: bytes) -> dict[str, Any]:
    """A manifest's values, without its own digest."""
    body: dict[str, Any] = json.loads(data)
    del body["self_sha256"]
    return body


def sealed(body: Any) -> bytes:
    """The bytes that an attacker would store: canonical, with a true digest, nothing checked."""
    return sealed_text(lambda digest: _dump(body if digest is None else _with(body, digest)))


def sealed_text(write: Callable[[str | None], str]) -> bytes:
    """The same of any text: `write(None)` is what is hashed, `write(digest)` what is stored."""
    bare = write(None).encode("utf-8", "surrogatepass")
    return write(hashlib.sha256(bare).hexdigest()).encode("utf-8", "surrogatepass")


def _with(body: Any, digest: str) -> Any:
    return {**body, "self_sha256": digest} if isinstance(body, dict) else body


def _dump(body: Any) -> str:
    return json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
