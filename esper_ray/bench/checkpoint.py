"""`bench checkpoint`: staging, commits and restores of a layer, beside what others would write."""

from __future__ import annotations

import contextlib
import functools
import itertools
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import numpy as np
import torch

from esper_ray.actors.layer_rows import LayerStaging, load_rows, seed_record
from esper_ray.bench.checkpoint_case import CheckpointCase, busy_step, manager_of
from esper_ray.bench.plain_checkpoints import PlainCheckpoints
from esper_ray.bench.rows import Row, make_row
from esper_ray.bench.s3_server import S3Server
from esper_ray.errors import StorageUnavailable
from esper_ray.layers import ChunkedKasminaLayer, LayerSeeds
from esper_ray.storage import CheckpointId, CheckpointManager, Root
from esper_ray.storage.segment_source import SegmentMemory

Figures = dict[str, float]

_TARGETS: Final = {
    "staging beside a busy step/p50": 0.5,
    "staging beside a busy step/p99": 5.0,
    "local/one seed restored/p50": 1.0,
    "local/layer saved, durable": 150.0,
    "local/layer restored": 30.0,
    "object store/one seed restored/p50": 20.0,
    "object store/1,000 seeds saved, durable": 1_000.0,
}
"""Largest milliseconds at a run queue of at most 2."""

_WINDOWS: Final = 3
_LAYER_SAVES: Final = 5
_OBJECT: Final = "object store"


def measure(
    url: str | None = None, quick: bool = False, case: CheckpointCase | None = None
) -> list[Row]:
    """Milliseconds of every part of a checkpoint, the best of interleaved repeats, with controls.

    The object store is `url`, or an S3 server that is started here and stopped again; without
    its package the rows of the object store say so. `quick` is one repeat of little, for a look.
    """
    quick_case = CheckpointCase(stagings=100, repeats=1, restores=50)
    chosen = case or (quick_case if quick else CheckpointCase())
    layer = chosen.build()
    folder, threads = Path(tempfile.mkdtemp(prefix="esper-bench-")), torch.get_num_threads()
    torch.set_num_threads(1)  # with more, one small operation can wait long on a busy machine
    try:
        with _object_store(url) as store:
            best, queues = _repeat(chosen, layer, folder, store)
    finally:
        torch.set_num_threads(threads)
        shutil.rmtree(folder, ignore_errors=True)
    rows = [make_row(name, value, "ms", _TARGETS.get(name)) for name, value in best.items()]
    rows.append(make_row("run queue, largest seen", max(queues), "tasks"))
    if isinstance(store, StorageUnavailable):
        rows.append(_missing(store))
    return rows


def _repeat(
    case: CheckpointCase, layer: ChunkedKasminaLayer, folder: Path, store: Root | StorageUnavailable
) -> tuple[Figures, list[int]]:
    best: Figures = {}
    queues = []
    plain = PlainCheckpoints(layer, folder / "plain")
    for number in range(case.repeats):
        local = Root.open(str(folder / f"local-{number}"))
        parts: list[Callable[[], Figures]] = [
            plain.measure,
            functools.partial(_commits, case, layer, local, "local"),
        ]
        if number < _WINDOWS:
            parts.append(functools.partial(_staging, case, layer, local))
        if isinstance(store, Root):
            place = store.below(uuid.uuid4().hex)
            parts.append(functools.partial(_commits, case, layer, place, _OBJECT))
        for part in parts:
            queues.append(_run_queue())
            for name, value in part().items():
                best[name] = float(min(value, best.get(name, value)))
    return best, queues


@contextlib.contextmanager
def _object_store(url: str | None) -> Iterator[Root | StorageUnavailable]:
    """A root to measure against, or why there is none."""
    if url is not None:
        yield Root.open(url)
        return
    server = S3Server()
    try:
        server.start()
        root: Root | StorageUnavailable = server.root("bench")
    except StorageUnavailable as error:
        root = error
    try:
        yield root
    finally:
        server.stop()


def _missing(error: StorageUnavailable) -> Row:
    row = make_row(f"{_OBJECT}/not measured", 0.0, "")
    return row | {"met": False, "error": f"{error.message}; {error.hint}"}


def _run_queue() -> int:
    """Tasks that run or wait for a processor, this one left out; 0 where the system hides it."""
    path = Path("/proc/loadavg")
    if not path.exists():
        return 0
    return max(0, int(path.read_text().split()[3].partition("/")[0]) - 1)


# ---- staging -------------------------------------------------------------------------------------


def _staging(case: CheckpointCase, layer: ChunkedKasminaLayer, root: Root) -> Figures:
    """A window of stagings, each after a training step, while a manager is always encoding."""
    step, staging, times = busy_step(layer), LayerStaging(layer), list[float]()
    with manager_of(layer, root) as manager:
        future = staging.save(manager, step=0)
        while len(times) < case.stagings:
            step()
            began = time.perf_counter()
            staged = staging.stage()
            times.append(time.perf_counter() - began)
            if staged is None:
                times.pop()  # the encoder had all buffers: nothing was staged
            elif future is None or future.done():
                future = manager.save_layer(staged, step=len(times))
            else:
                staged.release()
        manager.flush()
    p50, p90, p99 = np.percentile(times, [50, 90, 99]) * 1e3
    name = "staging beside a busy step"
    return {f"{name}/p50": p50, f"{name}/p90": p90, f"{name}/p99": p99}


# ---- commits and restores ------------------------------------------------------------------------


def _commits(case: CheckpointCase, layer: LayerSeeds, root: Root, place: str) -> Figures:
    found: Figures = {}
    with manager_of(layer, root) as manager:
        staging = LayerStaging(layer)
        saves = [_milliseconds(_save, staging, manager, n) for n in range(_LAYER_SAVES)]
        found[f"{place}/layer saved, durable"] = float(np.median(saves))
        held = np.flatnonzero(layer.state.host("columns")[layer.state.BLUEPRINT_ID] >= 0).tolist()
        records = [(seed, *seed_record(layer, seed)) for seed in held]
        began = time.perf_counter()
        ids = [manager.save_checkpoint(layer.layer_id, *record) for record in records]
        accepted = time.perf_counter() - began
        manager.flush()
        scale = 1_000 / len(ids)
        found[f"{place}/1,000 seeds saved, accepted"] = accepted * 1e3 * scale
        took = (time.perf_counter() - began) * 1e3 * scale
        found[f"{place}/1,000 seeds saved, durable"] = took
    return found | _restores(case, layer, root, place, ids)


def _save(staging: LayerStaging, manager: CheckpointManager, step: int) -> None:
    future = staging.save(manager, step)
    if future is not None:
        future.wait(timeout=60)


def _restores(
    case: CheckpointCase, layer: LayerSeeds, root: Root, place: str, ids: list[CheckpointId]
) -> Figures:
    """Restores by a process that has nothing in memory but, of one seed, the manifest."""
    whole, seeds = list[float](), list[float]()
    for _ in range(_LAYER_SAVES):
        reader = CheckpointManager(root, layer_id=layer.layer_id)
        whole.append(_milliseconds(_load, layer, reader))
    reader = CheckpointManager(root, layer_id=layer.layer_id)
    first = _milliseconds(reader.restore_checkpoint, ids[0], "cpu")
    reader.reader.source.memory = SegmentMemory(limit=0)
    for saved in itertools.islice(itertools.cycle(ids[:: max(1, len(ids) // 97)]), case.restores):
        seeds.append(_milliseconds(reader.restore_checkpoint, saved, "cpu"))
    p50, p90, p99 = np.percentile(seeds, [50, 90, 99])
    return {
        f"{place}/layer restored": float(np.median(whole)),
        f"{place}/first seed restored, manifest too": first,
        f"{place}/one seed restored/p50": float(p50),
        f"{place}/one seed restored/p90": float(p90),
        f"{place}/one seed restored/p99": float(p99),
    }


def _load(layer: LayerSeeds, reader: CheckpointManager) -> None:
    load_rows(layer, reader.restore_layer())


def _milliseconds(call: Callable[..., object], *given: object) -> float:
    began = time.perf_counter()
    call(*given)
    return (time.perf_counter() - began) * 1e3
