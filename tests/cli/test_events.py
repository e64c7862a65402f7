"""`events tail`: what is stored as lines, what is committed later, and what rewinds leave."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

from esper_ray.actors.event_feed import Entry, EventFeed
from esper_ray.cli import main
from esper_ray.events import cloud
from esper_ray.events.event import Event, Kind
from esper_ray.storage import Root, RunLog
from esper_ray.tail import Choice, follow, heard

if TYPE_CHECKING:
    from tests.cli.conftest import Command, Outcome, Snapshot

LAYERS = ("reader.hidden", "predictor.hidden")


def told(done: Outcome) -> list[Event]:
    assert (done.code, done.stderr) == (0, "")
    return [cloud.decode(line.encode()) for line in done.stdout.splitlines()]


def rewind(cli: Command) -> None:
    """Go back to the second commit of `store`, and two epochs on from there."""
    words = ("--resume", "store@step=6", "--set", "train.epochs=4")
    assert cli("train", "run.yaml", "--local", *words).code == 0


# ------------------------------------------------------------------ what is stored


def test_every_line_is_an_event_and_all_transitions_are_told(
    cli: Command, store: Path, everything: Callable[[], Snapshot]
) -> None:
    before = everything()
    events = told(cli("events", "tail", "store", "--json"))
    assert events[0].kind is Kind.STARTED
    assert len({event.id for event in events}) == len(events)
    for layer in LAYERS:
        for seed in range(4):
            explained = cli("explain", "store", "--layer", layer, "--seed", str(seed), "--json")
            moves = [e.data for e in events if (e.layer, e.seed_id) == (layer, seed)]
            assert len(moves) == len(json.loads(explained.stdout)["history"])
    committed = [e.data for e in events if e.kind is Kind.COMMITTED]
    assert [data["commit"] for data in committed] == [1, 2, 3, 4]  # type: ignore[index]
    assert everything() == before


def test_text_has_a_line_for_each_event(cli: Command, store: Path) -> None:
    done = cli("events", "tail", "store")
    lines = done.stdout.splitlines()
    assert len(lines) == len(told(cli("events", "tail", "store", "--json")))
    assert lines[0].endswith("run began")
    assert "reader.hidden, seed 0: DORMANT -> GERMINATED  policy" in lines[1]
    assert lines[-1].endswith("checkpoint 4 committed")


def test_run_is_named_by_its_run_file_too(cli: Command, store: Path) -> None:
    assert cli("events", "tail", "run.yaml") == cli("events", "tail", "store")


def test_one_layer_is_shown_with_what_is_about_the_run(cli: Command, store: Path) -> None:
    events = told(cli("events", "tail", "store", "--json", "--layer", LAYERS[0]))
    assert {event.layer for event in events} == {"", LAYERS[0]}


def test_tail_begins_after_an_event_by_its_id(cli: Command, store: Path) -> None:
    events = told(cli("events", "tail", "store", "--json"))
    rest = told(cli("events", "tail", "store", "--json", "--from", events[4].id))
    assert rest == events[5:]
    assert cli("events", "tail", "store", "--from", "new").stdout == ""


def test_unknown_id_is_refused(cli: Command, store: Path) -> None:
    error, hint = cli("events", "tail", "store", "--from", "tiny/x/0/1/0/9").failed(2)
    assert "no event of this run's history has the id" in error
    assert "earliest" in hint


# ------------------------------------------------------------------ rewinds


def test_rewound_rows_are_left_out_unless_asked_for(cli: Command, store: Path) -> None:
    before = told(cli("events", "tail", "store", "--json"))
    rewind(cli)
    after = told(cli("events", "tail", "store", "--json"))
    gone = {e.id for e in before} - {e.id for e in after}
    second = next(e for e in before if isinstance(e.data, dict) and e.data.get("commit") == 2)
    assert gone == {e.id for e in before if e.sequence > second.sequence}
    kept = [e for e in after if e.run_epoch == 1]
    assert kept == before[: len(kept)]
    [rewound] = [e for e in after if e.kind is Kind.REWOUND]
    assert isinstance(rewound.data, dict)
    assert rewound.data["resumed_from"] == 2
    assert rewound.data["superseded"] == {"first": 3, "last": 4}
    whole = told(cli("events", "tail", "store", "--json", "--superseded"))
    assert {e.id for e in whole} == {e.id for e in before} | {e.id for e in after}
    line = next(t for t in cli("events", "tail", "store").stdout.splitlines() if "start    2" in t)
    assert line.endswith("run went on from checkpoint 2; checkpoints 3 to 4 do not count any more")


def test_damaged_checkpoint_that_was_passed_over_is_told(cli: Command, store: Path) -> None:
    part = store / "log" / "00000001-00000000000000000004.arrow"
    part.write_bytes(part.read_bytes()[:-1])
    assert part.name in cli("events", "tail", "store").failed(4)[0]
    assert cli("train", "run.yaml", "--local").code == 0
    [damaged] = [
        e for e in told(cli("events", "tail", "store", "--json")) if e.kind is Kind.DAMAGED
    ]
    assert isinstance(damaged.data, dict)
    assert damaged.data["commit"] == 4


def test_damaged_log_is_damage(cli: Command, store: Path) -> None:
    part = store / "log" / "00000001-00000000000000000002.arrow"
    part.write_bytes(part.read_bytes()[:-1])
    assert part.name in cli("events", "tail", "store").failed(4)[0]


@pytest.mark.parametrize("run", ["absent", "memory://absent/run"])
def test_nothing_stored_is_not_found(cli: Command, run: str) -> None:
    assert "no run is stored at" in cli("events", "tail", run).failed(3)[0]


def test_words_that_make_no_sense_are_refused(cli: Command, store: Path) -> None:
    assert "--follow" in cli("events", "tail", "store", "--bus", "ray://x").failed(2)[0]
    known = cli("events", "tail", "store", "--follow", "--bus", "redis://x").failed(2)
    assert "memory://" in known[1]


# ------------------------------------------------------------------ following


def test_following_tells_what_is_committed_later_and_where_it_went_back(
    cli: Command, store: Path
) -> None:
    feed = EventFeed(RunLog(Root.open(str(store))), "tiny")
    seen: set[Entry] = set(feed.history())
    turns = [lambda: rewind(cli), lambda: None]

    class Enough(Exception):
        pass

    def pause(_: float) -> None:
        if not turns:
            raise Enough
        turns.pop(0)()

    found: list[Event] = []
    with pytest.raises(Enough):
        found.extend(follow(feed, Choice(LAYERS[0]), seen, 0.1, pause))
    # a list that fails to be extended keeps what came before
    assert found[0].kind is Kind.REWOUND
    assert found[-1].kind is Kind.COMMITTED
    assert {event.run_epoch for event in found} == {2}


async def test_hearing_tells_what_is_stored_and_then_the_bus_each_event_once(
    cli: Command, store: Path
) -> None:
    from esper_ray.events.hub import Hub, HubBus

    feed = EventFeed(RunLog(Root.open(str(store))), "tiny")
    batches = [event for entry in feed.history() for event in feed.events(entry)]
    hub = Hub()
    bus, publisher = HubBus(hub), HubBus(hub)

    def stored() -> list[Event]:
        return [cloud.single(batches[1], 0), batches[0]]

    source = heard(bus, "tiny", Choice(), stored, "g")
    found = [await anext(source), await anext(source)]
    await publisher.publish(batches)
    whole = len(told(cli("events", "tail", "store", "--json")))
    while len(found) < whole:
        found.append(await anext(source))
    assert len({event.id for event in found}) == whole
    await source.aclose()  # type: ignore[attr-defined]


@pytest.mark.usefixtures("interrupts")
def test_followed_process_prints_at_once_and_ends_by_ctrl_c(here: Path, finished_run: Path) -> None:
    words = [sys.executable, "-m", "esper_ray", "events", "tail", f"{finished_run}/store"]
    process = subprocess.Popen(
        [*words, "--follow", "--every", "0.1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "0"},
    )
    watchdog = threading.Timer(90, process.kill)
    watchdog.start()
    try:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.endswith("checkpoint 4 committed\n"):
                break
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    finally:
        watchdog.cancel()
        process.kill()
    assert (process.returncode, stderr.strip()) == (130, "error: interrupted")
    assert lines[0].endswith("run began\n")


def test_bus_that_the_run_cannot_reach_is_refused(cli: Command) -> None:
    for words in (("--local", "--set", "events.bus=ray://x"), ("--set", "events.bus=memory://x")):
        assert "cannot be reached" in cli("train", "run.yaml", *words).failed(2)[0]
    assert "events.bus" in cli("train", "run.yaml", "--set", "events.bus=nats://x").failed(2)[0]


def test_local_run_publishes_in_its_process_what_it_stores(here: Path, finished_run: Path) -> None:
    import asyncio

    from esper_ray.events.bus import connect

    async def listen(count: int) -> list[Any]:
        found = []
        for _ in range(count):
            delivery = await asyncio.wait_for(anext(deliveries), 10)
            found.append(delivery.event)
            await delivery.ack()
        return found

    bus = connect("memory://in-process")
    deliveries = bus.subscribe(group="g", run="tiny")
    words = ["train", "run.yaml", "--local", "--set", "events.bus=memory://in-process"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.stderr
    feed = EventFeed(RunLog(Root.open(str(here / "store"))), "tiny")
    stored = [event for entry in feed.history() for event in feed.events(entry)]
    found = asyncio.run(listen(len(stored)))
    assert {e.id for e in found} == {e.id for e in stored}
    for layer in ("", *LAYERS):
        assert [e for e in found if e.layer == layer] == [e for e in stored if e.layer == layer]
