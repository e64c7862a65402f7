"""`bench pipeline`: two stages in actors, by each transport, against the bound of a pipeline.

The bound of S equal stages and M micro-batches is T1 / S * (M + S - 1) / M, T1 being the step of
one process: Huang et al., GPipe, NeurIPS 2019, section 2.3, whose bubble 1F1B shares.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from esper_ray.bench.epochs import clocked, interleaved
from esper_ray.bench.rows import Row, make_row
from esper_ray.config import RunConfig, parse_config
from esper_ray.events.messages import EpochReport
from esper_ray.runtime import Runtime

_STAGES, _MICRO_BATCHES = 2, 8
_EPOCH_STEPS, _EPOCHS, _WARM_UP = 4, 10, 2
_TRANSPORTS = ("torch_dist", "object_store")


def measure() -> list[Row]:
    """Milliseconds of a step beside one process; what the actors are asked for and keep; losses."""
    found = {name: _measured(name) for name in _TRANSPORTS}
    alone = statistics.median([s for one in found.values() for s in one.times["one process"]])
    step = {name: statistics.median(one.times[name]) for name, one in found.items()}
    bound = alone / _STAGES * (_MICRO_BATCHES + _STAGES - 1) / _MICRO_BATCHES
    faster = step["torch_dist"] / step["object_store"]
    calls = max(one.calls for one in found.values()) / (_EPOCHS * _EPOCH_STEPS)
    return [
        make_row("one process/step", alone * 1e3, "ms"),
        make_row("bound of two stages/step", bound * 1e3, "ms"),
        *(make_row(f"{name}/step", seconds * 1e3, "ms") for name, seconds in step.items()),
        *(make_row(f"{name}/efficiency", bound / s, "ratio") for name, s in step.items()),
        make_row("torch_dist / object_store", faster, "ratio", 1),
        make_row("calls per actor and step", calls, "calls", 1),
        make_row("kept above min(S - s, M)", max(one.over for one in found.values()), "count", 0),
        make_row("loss / that of one process - 1", _loss_difference(), "ratio", 1e-6),
    ]


@dataclass(frozen=True, slots=True)
class _Measured:
    """Seconds of each step by run, the most calls of an actor, micro-batches kept too long."""

    times: Mapping[str, list[float]]
    calls: int
    over: int


def _measured(transport: str) -> _Measured:
    with (
        tempfile.TemporaryDirectory() as folder,
        Runtime(_config(f"{folder}/one", "auto", _EPOCHS), local=True) as one,
        Runtime(_config(f"{folder}/actors", transport, _EPOCHS)) as run,
    ):
        clocks = {"one process": clocked(one), transport: clocked(run)}
        actors = _counted(run)
        times = interleaved(clocks, _EPOCHS, _WARM_UP)
        calls = max(actor.calls for actor in actors)
        engine: Any = run._engine
        allowed = [min(_STAGES - stage, _MICRO_BATCHES) for stage in range(_STAGES)]
        kept = zip(engine.most_in_flight(), allowed, strict=True)
        return _Measured(times, calls, max(0, *(most - bound for most, bound in kept)))


def _config(url: str, transport: str, epochs: int) -> RunConfig:
    return parse_config(
        {
            "run": "bench-pipeline",
            "train": {"epochs": epochs, "micro_batches": _MICRO_BATCHES},
            "data": {"batch_size": 128 * _MICRO_BATCHES, "evaluation_samples": 512},
            "model": {"args": {"hidden": 512, "embedding": 32}},
            "seeds": {"targets": ["*.hidden"], "epoch_steps": _EPOCH_STEPS, "seeds_per_layer": 64},
            "lifecycle": {"germinate_after": 0, "minimum_epochs": {"TRAINING": 100}},
            "storage": {"url": url, "every_epochs": epochs},
            "cluster": {"transport": transport},
        }
    )


class _Counted:
    """An actor's handle that counts what it is asked for."""

    def __init__(self, actor: Any) -> None:
        self._actor, self.calls = actor, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._actor, name)

    def submit(self, method: str, *args: object) -> Any:
        """See RemoteActor."""
        self.calls += 1
        return self._actor.submit(method, *args)


def _counted(run: Runtime) -> list[_Counted]:
    """Have the driver's calls of each actor counted from now on."""
    actors: Any = run.actors
    actors[:] = counted = [_Counted(actor) for actor in actors]
    return counted


def _loss_difference() -> float:
    """Of the losses of two epochs with seeds in training, between actors and one process."""
    alone, together = (np.array(_losses(transport)) for transport in ("", "torch_dist"))
    return float(np.abs(alone - together).max() / np.abs(alone).max())


def _losses(transport: str) -> list[float]:
    """Of a run by that transport, or in one process without one."""
    losses: list[float] = []

    def take(report: EpochReport) -> None:
        losses.extend(report.losses)

    with tempfile.TemporaryDirectory() as folder:
        config = _config(folder, transport or "auto", 2)
        with Runtime(config, local=not transport) as run:
            run.fit("never", on_epoch=take)
    return losses
