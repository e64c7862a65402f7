"""A finished run read back: its events, its newest commit, and one against the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from esper_ray.actors.persistence import read_state
from esper_ray.config import RunConfig
from esper_ray.events.log import EventKind, Events, decode
from esper_ray.events.messages import EpochReport
from esper_ray.growth import snapshot
from esper_ray.lifecycle import Cause
from esper_ray.lifecycle import ExtendedLifecycle as S
from esper_ray.planning import RunPlan
from esper_ray.runtime import Runtime
from esper_ray.seeds.replay import replay
from esper_ray.storage import RunLog, SegmentRef, manifest

Listener = Callable[[Runtime, EpochReport], None]


def _quiet(runtime: Runtime, report: EpochReport) -> None:
    del runtime, report


def grow(
    config: RunConfig, resume: str = "never", *, local: bool = True, listen: Listener = _quiet
) -> tuple[RunLog, RunPlan, list[EpochReport]]:
    """Run to the end; `listen` may ask for changes between epochs."""
    reports: list[EpochReport] = []
    with Runtime(config, local=local) as runtime:

        def on_epoch(report: EpochReport) -> None:
            reports.append(report)
            listen(runtime, report)

        runtime.fit(resume, on_epoch=on_epoch)
        return RunLog(runtime.root), runtime.plan, reports


def newest(log: RunLog) -> dict[str, Any]:
    return log.read_commit(log.lineage()[0])


def segments(body: dict[str, Any]) -> dict[str, SegmentRef]:
    return {ref.name: ref for ref in manifest.segments(body)}


def events_of(log: RunLog, *kinds: EventKind) -> Events:
    """All events of the current history, or those of some kinds."""
    events = Events.concatenate([decode(log.read_log(ref)) for _, ref in log.log_parts()])
    return events.take(np.isin(events.columns["kind"], kinds or list(EventKind)))


def stored_states(log: RunLog, layer: str) -> list[S]:
    """State of every seed of a layer in the newest commit."""
    columns = read_state(log, segments(newest(log)), layer)
    return [S(code) for code in columns["lifecycle_state"].tolist()]


def assert_log_replays(log: RunLog, plan: RunPlan, upto: int | None = None) -> None:
    """The events alone lead to every stored column of every layer, bit for bit."""
    seq = log.lineage()[0] if upto is None else upto
    told = [decode(log.read_log(ref)) for _, ref in log.log_parts(seq)]
    events, parts = Events.concatenate(told), segments(log.read_commit(seq))
    assert plan.layers
    for layer in plan.layers:
        stored = read_state(log, parts, layer.layer_id)
        state = replay(events, layer.layer_id, layer.seeds, plan.coordinator.grafting)
        found = snapshot.state_columns(state)
        assert list(found) == list(stored) == list(snapshot.STATE_SCHEMA)
        for name, values in found.items():
            same = values.dtype == stored[name].dtype and values.tobytes() == stored[name].tobytes()
            assert same, (layer.layer_id, name, values.tolist(), stored[name].tolist())


def changes(log: RunLog, layer: str, seed: int) -> list[tuple[str, str]]:
    """(cause, state reached) of every move and replant of a seed, oldest first."""
    events = events_of(log, EventKind.TRANSITION, EventKind.REPLANT).of(layer, seed)
    columns = events.columns
    reached = [S(code).name for code in columns["to_state"].tolist()]
    return [(Cause[c].name, to) for c, to in zip(columns["cause"], reached, strict=True)]
