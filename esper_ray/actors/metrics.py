"""The metrics of a run: one table, and one hub that turns reports of an epoch into them."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

from esper_ray.events.messages import EpochReport
from esper_ray.lifecycle import ExtendedLifecycle

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric of the table: its kind, what it says, and its tags besides `run`."""

    kind: Literal["gauge", "counter", "histogram"]
    about: str
    tags: tuple[str, ...] = ()


METRICS: Final[Mapping[str, Metric]] = {
    "esper_seeds": Metric("gauge", "Seeds by layer and state.", ("layer", "state")),
    "esper_transitions_total": Metric(
        "counter", "Applied transitions by layer.", ("layer", "from", "to")
    ),
    "esper_step_seconds": Metric(
        "histogram", "Wall time of an optimiser step, the mean of its lifecycle epoch."
    ),
    "esper_checkpoint_seconds": Metric("histogram", "Time that a commit took.", ("op",)),
    "esper_uncommitted_steps": Metric("gauge", "Steps that a crash now would repeat."),
    "esper_outbox": Metric("gauge", "Commits that the event bus has not got yet."),
    "esper_run_epoch": Metric("gauge", "Number of the run's present start."),
    "esper_gate_loss": Metric("gauge", "Loss on the gate split, in nats."),
}
"""Every metric, by its name; Ray shows it as ray_NAME. No tag holds a seed, step or process."""


class Rim(Protocol):
    """Where values go."""

    def write(self, name: str, value: float, tags: Mapping[str, str]) -> None:
        """Set a gauge, add to a counter, observe in a histogram."""
        ...


class MetricsHub:
    """Turns what a run reports into values of METRICS; the only one that writes them."""

    def __init__(self, rim: Rim, run: str) -> None:
        self._rim, self._run = rim, run
        self._layers: set[str] = set()
        self._committed_step: int | None = None

    def started(self, run_epoch: int) -> None:
        """The run began, or began anew."""
        self._write("esper_run_epoch", run_epoch)
        self._committed_step = None

    def steps(self, seconds: float, count: int) -> None:
        """`count` optimiser steps took `seconds` together."""
        if count > 0:
            self._write("esper_step_seconds", seconds / count)

    def saved(self, seconds: float) -> None:
        """A commit was made."""
        self._write("esper_checkpoint_seconds", seconds, op="save")

    def epoch(self, report: EpochReport, backlog: int) -> None:
        """A lifecycle epoch ended; `backlog` commits wait for the bus."""
        for layer, states in report.seeds.items():
            for state in ExtendedLifecycle:  # those without a seed too, or the last count stays
                count = states.get(state.name, 0)
                self._write("esper_seeds", count, layer=layer, state=state.name)
        for (layer, source, target), count in _counted(report.moves).items():
            moved = {"layer": layer, "from": source, "to": target}
            self._write("esper_transitions_total", count, **moved)
        if report.commit is not None:
            self._committed_step = report.step
        if self._committed_step is None:  # the commit or the birth that this start went on from
            self._committed_step = report.step - len(report.losses)
        self._write("esper_uncommitted_steps", report.step - self._committed_step)
        self._write("esper_outbox", backlog)
        self._write("esper_gate_loss", report.gate_loss)

    def _write(self, name: str, value: float, **tags: str) -> None:
        if set(tags) != set(METRICS[name].tags):
            raise ValueError(f"{name} has the tags {METRICS[name].tags}, not {sorted(tags)}")
        self._rim.write(name, float(value), {"run": self._run, **tags})


def _counted(moves: Sequence[tuple[str, int, str, str]]) -> dict[tuple[str, str, str], int]:
    counts: dict[tuple[str, str, str], int] = {}
    for layer, _, source, target in moves:
        counts[layer, source, target] = counts.get((layer, source, target), 0) + 1
    return counts


class NoRim:
    """Where nobody collects: without Ray."""

    def write(self, name: str, value: float, tags: Mapping[str, str]) -> None:
        """Nothing."""


class RayRim:
    """`ray.util.metrics`, in a process of a cluster."""

    def __init__(self) -> None:
        from ray.util import metrics

        kinds = {"gauge": metrics.Gauge, "counter": metrics.Counter}
        self._made: dict[str, Any] = {}
        for name, metric in METRICS.items():
            given: dict[str, Any] = {"tag_keys": ("run", *metric.tags)}
            made: Any
            if metric.kind == "histogram":
                made = metrics.Histogram(name, metric.about, boundaries=list(_SECONDS), **given)
            else:
                made = kinds[metric.kind](name, metric.about, **given)
            self._made[name] = made

    def write(self, name: str, value: float, tags: Mapping[str, str]) -> None:
        """See Rim."""
        made, plain = self._made[name], dict(tags)
        kind = METRICS[name].kind
        if kind == "gauge":
            made.set(value, tags=plain)
        elif kind == "counter":
            made.inc(value, tags=plain)
        else:
            made.observe(value, tags=plain)


def rim_here() -> Rim:
    """Ray's where this process is an actor of a cluster, else none."""
    if "ray" in sys.modules:
        import ray

        if ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None:
            return _ray_rim()
    return NoRim()


@functools.cache
def _ray_rim() -> RayRim:
    """One in a process: a metric of one name is made once."""
    return RayRim()
