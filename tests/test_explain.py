"""What is told about a seed is what its events say, for every state and every bad question."""

from __future__ import annotations

import itertools
import json
import math
import uuid
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_ray.errors import CheckpointNotFound, ConfigError, CorruptError
from esper_ray.events.log import EventKind, Events, encode, gate_json
from esper_ray.explain import explain, explain_text
from esper_ray.lifecycle import TERMINAL_STATES, ExtendedLifecycle, StateTransition
from esper_ray.storage import Root, RunLog

S = ExtendedLifecycle
LAYER = "blocks.0.mlp"
ACCEPTED = gate_json(
    "reconstruction",
    {"delta_ratio": 0.031, "local_loss": math.nan, "alpha": 1.0, "score": math.inf},
    {"delta_ratio": "<= 0.5", "local_loss": "a finite value"},
    "accepted",
)
REFUSED = gate_json(
    "improvement",
    {"total_improvement": 0.001},
    {"total_improvement": ">= 0.002"},
    "total_improvement is 0.001, and >= 0.002 is needed",
)


def event(kind: EventKind, epoch: int = 0, layer: str = LAYER, **given: Any) -> Events:
    given = {"seed_id": 1, "generation": 0, **given}
    return Events.build(kind, layer, epoch, epoch, 8 * epoch, 1, **given)


def seeds_of(layer: str = LAYER, seeds: int = 4, epoch: int = 0) -> Events:
    return event(EventKind.EPOCH, epoch, layer, seed_id=-1, generation=-1, errors=seeds)


def move(source: S, target: S, epoch: int, **given: Any) -> Events:
    ends = {"from_state": source, "to_state": target}
    return event(EventKind.TRANSITION, epoch, **{**ends, "cause": "POLICY", **given})


def refusal(source: S, target: S, epoch: int, **given: Any) -> Events:
    ends = {"from_state": source, "to_state": target}
    return event(EventKind.REFUSAL, epoch, **{**ends, "cause": "POLICY", **given})


def stored(*commits: Sequence[Events]) -> RunLog:
    log = RunLog(Root.open(f"memory://{uuid.uuid4().hex}/run"))
    log.open_epoch(None)
    for seq, parts in enumerate(commits, 1):
        add(log, seq, parts)
    return log


def add(log: RunLog, seq: int, parts: Sequence[Events], rows: int | None = None) -> None:
    events = Events.concatenate(parts)
    count = len(events) if rows is None else rows
    log.commit(seq, {"step": seq}, [], log.put_log(seq, encode(events), count))


# ------------------------------------------------------------------ the document


def test_history_of_a_seed_is_told_over_all_commits() -> None:
    log = stored(
        [seeds_of(), move(S.DORMANT, S.GERMINATED, 1)],
        [seeds_of(), move(S.GERMINATED, S.TRAINING, 2, seed_id=0)],
        [
            move(S.GERMINATED, S.TRAINING, 3, alpha=0.0, cause="USER"),
            move(S.TRAINING, S.GRAFTING, 38, gate=ACCEPTED, alpha=0.0, score=0.25),
        ],
    )
    document = explain(log, LAYER, 1)
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert list(document) == [
        "layer",
        "seed",
        "generation",
        "state",
        "strategy",
        "history",
        "waiting",
        "continues",
    ]
    assert (document["layer"], document["seed"], document["generation"]) == (LAYER, 1, 0)
    assert (document["state"], document["waiting"]) == ("GRAFTING", None)
    assert [(m["epoch"], m["from"], m["to"], m["cause"]) for m in document["history"]] == [
        (1, "DORMANT", "GERMINATED", "POLICY"),
        (3, "GERMINATED", "TRAINING", "USER"),
        (38, "TRAINING", "GRAFTING", "POLICY"),
    ]
    first, _, last = document["history"]
    assert (first["gate"], first["alpha"], first["score"], first["step"]) == (None, None, None, 8)
    assert (last["alpha"], last["score"], last["step"]) == (0.0, 0.25, 304)
    assert last["gate"] == {
        "name": "reconstruction",
        "inputs": {"delta_ratio": 0.031, "local_loss": None, "alpha": 1.0, "score": None},
        "thresholds": {"delta_ratio": "<= 0.5", "local_loss": "a finite value"},
        "verdict": "accepted",
    }


def test_rewound_events_are_not_told() -> None:
    log = stored([seeds_of(), move(S.DORMANT, S.GERMINATED, 1)])
    add(log, 2, [move(S.GERMINATED, S.CANCELLED, 2)])
    log.open_epoch(1)
    add(log, 3, [move(S.GERMINATED, S.TRAINING, 2)])
    assert [m["to"] for m in explain(log, LAYER, 1)["history"]] == ["GERMINATED", "TRAINING"]


def test_seed_without_events_is_dormant() -> None:
    document = explain(stored([seeds_of()]), LAYER, 3)
    assert document["state"] == "DORMANT"
    assert (document["history"], document["waiting"], document["generation"]) == ([], None, 0)


def test_replant_starts_anew_and_keeps_what_was() -> None:
    log = stored(
        [
            seeds_of(),
            move(S.DORMANT, S.GERMINATED, 1),
            move(S.GERMINATED, S.CANCELLED, 2),
            event(EventKind.REPLANT, 9, generation=0, from_state=S.CANCELLED),
        ]
    )
    document = explain(log, LAYER, 1)
    assert (document["state"], document["generation"]) == ("DORMANT", 1)
    assert document["history"][-1] | {"alpha": None} == {
        "epoch": 9,
        "step": 72,
        "from": "CANCELLED",
        "to": "DORMANT",
        "cause": "REPLANT",
        "gate": None,
        "alpha": None,
        "score": None,
    }


def test_newest_refusal_of_the_present_state_is_what_a_seed_waits_for() -> None:
    log = stored(
        [seeds_of(), move(S.DORMANT, S.GERMINATED, 1), refusal(S.DORMANT, S.GERMINATED, 1)],
        [refusal(S.GERMINATED, S.TRAINING, 2), refusal(S.GERMINATED, S.CANCELLED, 3, gate=REFUSED)],
        [refusal(S.GERMINATED, S.TRAINING, 4, seed_id=2)],
    )
    waiting = explain(log, LAYER, 1)["waiting"]
    assert (waiting["epoch"], waiting["step"], waiting["to"]) == (3, 24, "CANCELLED")
    assert waiting["gate"]["verdict"] == "total_improvement is 0.001, and >= 0.002 is needed"
    assert explain(log, LAYER, 2)["waiting"] is None


def test_refusal_of_an_earlier_state_is_forgotten() -> None:
    log = stored(
        [
            seeds_of(),
            move(S.DORMANT, S.GERMINATED, 1),
            refusal(S.GERMINATED, S.TRAINING, 2),
            move(S.GERMINATED, S.TRAINING, 3),
        ]
    )
    assert explain(log, LAYER, 1)["waiting"] is None


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_legal_walk_is_told_as_it_was_made(data: st.DataObject) -> None:
    path = [S.DORMANT]
    while targets := StateTransition.VALID_TRANSITIONS[path[-1]]:
        if not data.draw(st.booleans(), "go on") and len(path) > 2:
            break
        path.append(data.draw(st.sampled_from(targets)))
    pairs = list(itertools.pairwise(path))
    moves = [move(source, target, epoch) for epoch, (source, target) in enumerate(pairs)]
    cut = data.draw(st.integers(0, len(moves)))
    document = explain(stored([seeds_of(), *moves[:cut]], moves[cut:]), LAYER, 1)
    assert document["state"] == path[-1].name
    assert [(m["from"], m["to"]) for m in document["history"]] == [
        (source.name, target.name) for source, target in pairs
    ]
    lines = explain_text(document).splitlines()
    assert len(lines) == 2 + len(moves)
    assert lines[-1].startswith("ended:" if path[-1] in TERMINAL_STATES else "waits:")


# ------------------------------------------------------------------ bad questions


def test_unknown_layer_is_refused_with_the_nearest() -> None:
    log = stored([seeds_of(), seeds_of("blocks.1.mlp"), seeds_of("head"), seeds_of("encoder")])
    with pytest.raises(ConfigError, match=r"layer 'blocks.2.mlp'") as caught:
        explain(log, "blocks.2.mlp", 0)
    for near in (LAYER, "blocks.1.mlp"):
        assert near in caught.value.hint


def test_run_without_events_says_so() -> None:
    log = stored()
    log.commit(1, {"step": 1}, [])
    with pytest.raises(ConfigError, match="no event is stored at memory"):
        explain(log, LAYER, 0)


def test_run_without_commits_has_no_checkpoint() -> None:
    with pytest.raises(CheckpointNotFound, match="no checkpoint is stored"):
        explain(stored(), LAYER, 0)


@pytest.mark.parametrize("seed_id", [-1, -2, 4, 2**40])
def test_seed_out_of_range_is_refused_with_the_range(seed_id: int) -> None:
    with pytest.raises(ConfigError, match=f"no seed {seed_id}") as caught:
        explain(stored([seeds_of()]), LAYER, seed_id)
    assert caught.value.hint == "its seeds are 0 to 3"


def test_seed_of_a_layer_of_unknown_size_needs_an_event() -> None:
    log = stored([move(S.DORMANT, S.GERMINATED, 1)])
    assert explain(log, LAYER, 1)["state"] == "GERMINATED"
    with pytest.raises(ConfigError, match="no seed 0"):
        explain(log, LAYER, 0)


# ------------------------------------------------------------------ damage


def test_part_that_is_no_log_is_damage_by_name() -> None:
    log = stored([seeds_of()])
    log.commit(2, {"step": 2}, [], log.put_log(2, b"no log", 1))
    with pytest.raises(CorruptError, match=r"log/00000001-0+2\.arrow: an event log"):
        explain(log, LAYER, 0)


def test_part_of_another_length_is_damage() -> None:
    log = stored([seeds_of()])
    add(log, 2, [seeds_of()], rows=2)
    with pytest.raises(CorruptError, match="has 1 rows, not 2"):
        explain(log, LAYER, 0)


@pytest.mark.parametrize(
    "change", [{"to_state": -1}, {"to_state": 11}, {"from_state": 99}, {"gate": "{}"}]
)
def test_event_that_makes_no_sense_is_damage(change: dict[str, Any]) -> None:
    log = stored([move(S.DORMANT, S.GERMINATED, 1, **change)])
    with pytest.raises(CorruptError):
        explain(log, LAYER, 1)


# ------------------------------------------------------------------ in words


def test_story_of_a_waiting_seed_reads_as_lines() -> None:
    log = stored(
        [
            seeds_of(),
            move(S.DORMANT, S.GERMINATED, 1),
            move(S.GERMINATED, S.TRAINING, 3, cause="USER"),
            move(S.TRAINING, S.GRAFTING, 38, gate=ACCEPTED),
            refusal(S.GRAFTING, S.STABILIZATION, 40, gate=REFUSED),
        ]
    )
    assert explain_text(explain(log, LAYER, 1)).splitlines() == [
        "blocks.0.mlp, seed 1, generation 0: GRAFTING",
        "epoch    2  DORMANT -> GERMINATED  policy",
        "epoch    4  GERMINATED -> TRAINING  user",
        "epoch   39  TRAINING -> GRAFTING  policy  reconstruction gate: "
        "delta_ratio 0.031 <= 0.5, local_loss not measured (a finite value), alpha 1, "
        "score not measured",
        "waits: STABILIZATION was refused in epoch 41: "
        "total_improvement is 0.001, and >= 0.002 is needed",
    ]


def test_seed_that_nobody_refused_waits() -> None:
    text = explain_text(explain(stored([seeds_of()]), LAYER, 0))
    assert text.splitlines() == [
        "blocks.0.mlp, seed 0, generation 0: DORMANT",
        "waits: no request was refused since the last commit",
    ]


def test_refusal_without_a_gate_is_still_told() -> None:
    log = stored([seeds_of(), refusal(S.DORMANT, S.GERMINATED, 5)])
    last = explain_text(explain(log, LAYER, 1)).splitlines()[-1]
    assert last == "waits: GERMINATED was refused in epoch 6"


@pytest.mark.parametrize("gate", ["", REFUSED])
def test_end_of_a_seed_names_what_ended_it(gate: str) -> None:
    log = stored([seeds_of(), move(S.FINE_TUNING, S.CULLED, 99, cause="TIMEOUT", gate=gate)])
    last = explain_text(explain(log, LAYER, 1)).splitlines()[-1]
    why = "improvement gate: total_improvement 0.001 >= 0.002" if gate else "no gate"
    assert last == f"ended: CULLED in epoch 100, timeout, {why}"


def test_stored_text_cannot_steer_a_terminal() -> None:
    hostile = gate_json("\x1b[2J\n", {"\x07": 1.0}, {"a": "\r"}, "accepted")
    log = stored([move(S.DORMANT, S.GERMINATED, 1, gate=hostile, cause="\x9b")])
    lines = explain_text(explain(log, LAYER, 1)).split("\n")
    assert len(lines) == 3
    assert all(line.isprintable() for line in lines)
