"""What the coordinator's calls become for actors: who is asked what, and how often."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from esper_ray.actors.grid import Grid
from esper_ray.actors.pipeline import ActorPipeline, Home, LocalPipeline
from esper_ray.actors.protocol import Answer, Stamp, Stamped
from esper_ray.actors.remote import RemoteActor
from esper_ray.config import parse_config
from esper_ray.errors import RunFailed
from esper_ray.events.messages import (
    EvaluationRequest,
    MetricsBatch,
    TransitionBatch,
    TransitionReceipt,
)
from esper_ray.planning import plan_run
from esper_ray.storage import Root

SMALL = {
    "run": "small",
    "data": {"args": {"window": 4, "cap_bytes": 60_000}, "evaluation_samples": 16},
    "model": {"args": {"window": 4, "embedding": 4, "hidden": 16}},
    "seeds": {"targets": ["*.hidden"]},
}

Call = tuple[str, str, tuple[object, ...]]


@dataclass
class Recorder:
    """An actor that keeps its calls and answers from a table."""

    name: str
    calls: list[Call]
    answers: Mapping[str, Any] = field(default_factory=dict)

    def tell(self, method: str, *args: object) -> None:
        self.calls.append((self.name, method, args))

    async def ask(self, method: str, *args: object) -> Any:
        self.tell(method, *args)
        answer = self.answers[method]
        if isinstance(answer, Exception):
            raise answer
        return answer


def at(**stages: int) -> dict[str, Home]:
    return {layer: Home(stage, 1) for layer, stage in stages.items()}


def batch(layer: str) -> Stamped[TransitionBatch]:
    none = np.array([], dtype=np.int64)
    body = TransitionBatch(layer, 1, 0, *[none] * 8)  # type: ignore[arg-type]
    return Stamped(Stamp(1, 1, 1), body)


def receipt(layer: str, number: int = 1) -> Stamped[TransitionReceipt]:
    none: Any = np.array([], dtype=np.uint8)
    return Stamped(Stamp(1, 1, number), TransitionReceipt(layer, number, 4, none, none))


def measured(layer: str) -> MetricsBatch:
    none: Any = np.array([], dtype=np.float32)
    return MetricsBatch(layer, none, none, none, none)


async def test_metrics_and_batches_go_to_the_owners_of_the_layers_only() -> None:
    calls: list[Call] = []
    told = {"a": [receipt("y")], "b": [], "c": [receipt("z")]}
    actors = [Recorder(n, calls, {"offer": Answer.ACCEPTED, "apply": told[n]}) for n in "abc"]
    pipeline = ActorPipeline(actors, Grid((1, 1, 1)), at(x=0, y=0, z=2, w=1))
    one, two, seen = batch("y"), batch("z"), measured("x")
    receipts = await pipeline.apply([one, two], [seen])
    assert [receipt.body.layer_id for receipt in receipts] == ["y", "z"]
    assert ("a", "offer", (one,)) in calls
    assert ("c", "offer", (two,)) in calls
    applied = {name: args for name, method, args in calls if method == "apply"}
    assert applied == {"a": ([seen],), "c": ([],)}
    offers = [i for i, call in enumerate(calls) if call[1] == "offer"]
    assert max(offers) < min(i for i, call in enumerate(calls) if call[1] == "apply")


async def test_all_receipts_of_an_owner_come_back_known_ones_too() -> None:
    answers = {"offer": Answer.ACCEPTED, "apply": [receipt("x", number=7), receipt("y")]}
    actors = [Recorder("a", [], answers)]
    receipts = await ActorPipeline(actors, Grid((1,)), at(x=0, y=0)).apply([batch("y")], [])
    assert [(r.body.layer_id, r.stamp.number) for r in receipts] == [("x", 7), ("y", 1)]


async def test_nothing_to_apply_or_record_asks_nobody() -> None:
    calls: list[Call] = []
    assert await ActorPipeline([Recorder("a", calls)], Grid((1,)), at(x=0)).apply([], []) == []
    assert calls == []


async def test_acknowledgement_goes_to_the_owner_and_is_not_waited_for() -> None:
    calls: list[Call] = []
    actors = [Recorder(name, calls, {"acknowledge": RunFailed("lost")}) for name in "ab"]
    stamp = Stamp(1, 1, 4)
    await ActorPipeline(actors, Grid((1, 1)), at(x=0, y=1)).acknowledge("y", stamp)
    assert calls == [("b", "acknowledge", ("y", stamp))]


async def test_offer_that_fails_is_raised_before_anything_is_applied() -> None:
    calls: list[Call] = []
    actors = [Recorder("a", calls, {"offer": RunFailed("the layer is gone"), "apply": []})]
    with pytest.raises(RunFailed, match="the layer is gone"):
        await ActorPipeline(actors, Grid((1,)), at(x=0)).apply([batch("x")], [measured("x")])
    assert [method for _, method, _ in calls] == ["offer"]


async def test_every_stage_saves_and_the_last_one_answers_an_evaluation() -> None:
    calls: list[Call] = []
    request = EvaluationRequest(1, "gate", 1, {})
    actors = [Recorder(n, calls, {"save": [n, n * 2], "evaluate": f"{n}!"}) for n in "ab"]
    pipeline = ActorPipeline(actors, Grid((1, 1)), {})
    assert list(map(str, await pipeline.save())) == ["a", "aa", "b", "bb"]
    assert str(await pipeline.evaluate(request)) == "b!"
    assert [(n, m) for n, m, _ in calls] == [
        ("a", "save"),
        ("b", "save"),
        ("a", "evaluate"),
        ("b", "evaluate"),
    ]


async def test_failure_of_any_stage_is_raised() -> None:
    actors = [
        Recorder("a", [], {"save": RunFailed("disk of a")}),
        Recorder("b", [], {"save": []}),
    ]
    with pytest.raises(RunFailed, match="disk of a"):
        await ActorPipeline(actors, Grid((1, 1)), {}).save()


async def test_stages_without_the_last_one_give_no_evaluation() -> None:
    plan = plan_run(parse_config(SMALL))
    root = Root.open("memory://without-the-last/run")
    pipeline = LocalPipeline(plan.stages[:1], root, None, 1)
    with pytest.raises(RuntimeError, match="the last stage computes no loss"):
        await pipeline.evaluate(EvaluationRequest(1, "gate", 1, {}))


# ------------------------------------------------------------------ handles


class Handle:
    """Ray's calling convention: handle.method.options(...).remote(...)."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str | None, tuple[object, ...]]] = []

    def __getattr__(self, method: str) -> Bound:
        return Bound(self, method)


@dataclass
class Bound:
    handle: Handle
    method: str
    group: str | None = None

    def options(self, concurrency_group: str) -> Bound:
        return Bound(self.handle, self.method, concurrency_group)

    def remote(self, *args: object) -> asyncio.Future[object]:
        self.handle.calls.append((self.method, self.group, args))
        future: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        future.set_result(len(self.handle.calls))
        return future


async def test_remote_actor_calls_each_method_in_its_group() -> None:
    handle: Any = Handle()
    actor = RemoteActor(handle, {"ping": "control"})
    actor.tell("ping")
    assert await actor.ask("other", 1, "two") == 2
    assert handle.calls == [("ping", "control", ()), ("other", None, (1, "two"))]
