"""Who gets which event, under any order of consumers that take, refuse, leave and vanish."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_ray.errors import BusError
from esper_ray.events.broker import Broker, Group, Record, Retention

GROUP = Group("g", "run", None)
LAYERS = "ab"


def record(number: int, layer: str = "a") -> Record:
    return Record(f"run/{layer}/0/1/0/{number}", "run", layer, 0, b"")


def joined(**given: float) -> Broker:
    broker = Broker(Retention(**given))  # type: ignore[arg-type]
    broker.join(GROUP, "new", (), 0.0)
    return broker


moves = st.lists(
    st.tuples(
        st.sampled_from(["publish", "fetch", "ack", "nack", "leave", "wait"]),
        st.integers(0, 2),
        st.integers(0, 3),
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(moves)
def test_every_event_is_done_once_by_someone_and_in_order(
    plan: list[tuple[str, int, int]],
) -> None:
    broker, now, names = joined(deliveries=10**6, lease_s=5.0), 0.0, 0
    published: dict[str, list[str]] = {layer: [] for layer in LAYERS}
    done: dict[str, list[str]] = {layer: [] for layer in LAYERS}
    holds: dict[int, list[Record]] = {0: [], 1: [], 2: []}
    called = {0: 0.0, 1: 0.0, 2: 0.0}
    life = [0, 0, 0]

    def finish(who: int) -> None:
        first = holds[who].pop(0)
        broker.ack(GROUP, f"{who}.{life[who]}", first, now)
        done[first.layer].append(first.id)

    for move, who, size in plan:
        name = f"{who}.{life[who]}"
        if move == "publish":
            some = [record(names + i, LAYERS[(names + i) % 2]) for i in range(size)]
            names += size
            assert broker.publish(some + some, now) == size
            for each in some:
                published[each.layer].append(each.id)
        elif move == "wait":
            now += size
            for other in holds:  # who has not called for long must expect to have lost what it held
                if now - called[other] > 5.0:
                    holds[other] = []
        elif move == "leave":
            broker.leave(GROUP, name, now)
            holds[who], life[who] = [], life[who] + 1
        elif move == "fetch":
            called[who] = now
            holds[who] += broker.fetch(GROUP, name, size, now)
        elif holds[who]:
            called[who] = now
            if move == "ack":
                finish(who)
            else:
                refused = holds[who][0]
                holds[who] = [r for r in holds[who] if r.layer != refused.layer]
                broker.nack(GROUP, name, refused, 1.0, now)
    now += 100.0
    while left := broker.fetch(GROUP, "last", 3, now):
        for each in left:
            broker.ack(GROUP, "last", each, now)
            done[each.layer].append(each.id)
    for layer in LAYERS:
        first = list(dict.fromkeys(done[layer]))
        assert first == published[layer]
    assert broker.lost == 0


def test_group_that_is_too_far_behind_loses_the_oldest_and_says_so() -> None:
    broker = joined(events=3)
    broker.publish([record(i) for i in range(5)], 0.0)
    assert [r.id for r in broker.fetch(GROUP, "c", 9, 0.0)] == [record(i).id for i in (2, 3, 4)]
    assert (broker.lost, broker.has_all("run"), broker.has_all("other")) == (2, False, True)


def test_old_events_are_not_kept_for_groups_to_come() -> None:
    broker = Broker(Retention(age_s=10.0))
    broker.publish([record(1)], 0.0)
    broker.publish([record(2)], 20.0)
    broker.join(GROUP, "earliest", (), 20.0)
    assert broker.fetch(GROUP, "c", 9, 20.0) == [record(2)]


def test_older_events_come_before_those_that_are_kept_and_once() -> None:
    broker = Broker(Retention())
    broker.publish([record(2), record(3)], 0.0)
    older = [record(0), record(1), record(2)]
    broker.join(GROUP, record(0).id, older, 0.0)
    assert broker.fetch(GROUP, "c", 9, 0.0) == [record(1), record(2), record(3)]


def test_group_without_a_consumer_is_forgotten_and_says_so() -> None:
    broker = joined(age_s=10.0)
    broker.join(GROUP._replace(name="other"), "new", (), 20.0)
    with pytest.raises(BusError, match="not known here") as refusal:
        broker.fetch(GROUP, "c", 9, 20.0)
    assert refusal.value.hint == "subscribe again"


def test_only_the_event_at_work_is_blamed_for_consumers_that_vanish() -> None:
    broker = joined(deliveries=2, lease_s=1.0)
    broker.publish([record(1), record(2)], 0.0)
    for turn in range(2):
        assert len(broker.fetch(GROUP, f"c{turn}", 9, 10.0 * turn)) == 2
    assert broker.fetch(GROUP, "c3", 9, 30.0) == [record(2)]
    dead = Group("g", "run.dead", None)
    broker.join(dead, "earliest", (), 30.0)
    assert [r.id for r in broker.fetch(dead, "c", 9, 30.0)] == [record(1).id]


@pytest.mark.parametrize("given", [{"events": 0}, {"age_s": 0.0}, {"deliveries": 0}])
def test_retention_that_keeps_nothing_is_refused(given: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="keeps nothing"):
        Retention(**given)  # type: ignore[arg-type]
