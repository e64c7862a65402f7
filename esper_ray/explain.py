"""Why a seed is where it is, told from the event log of its run."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from esper_ray.errors import CheckpointNotFound, ConfigError, CorruptError
from esper_ray.events.log import EventKind, Events, Gate, decode, parse_gate
from esper_ray.grafting import STRATEGIES
from esper_ray.lifecycle import TERMINAL_STATES, ExtendedLifecycle
from esper_ray.storage import LogRef, RunLog

_MOVES = (EventKind.TRANSITION, EventKind.REPLANT)


def explain(log: RunLog, layer: str, seed_id: int, upto: int | None = None) -> dict[str, Any]:
    """What happened to one seed in the current history of a run, or up to a commit.

    `history` has its transitions and replants, oldest first; `waiting` is the newest refusal of
    the state that it is in; `continues` is the URL of the run that this one went on from, whose log
    tells what came before. ConfigError names what exists if there is no such layer or seed.
    """
    rows = list(_rows(_seed_events(log, layer, seed_id, upto)))
    history: list[dict[str, Any]] = []
    source = log.source(upto)
    state, waiting = _first_state(rows, elsewhere=source is not None), None
    for row in rows:
        if row["kind"] in _MOVES:
            history.append(_move(row))
            state, waiting = ExtendedLifecycle[history[-1]["to"]], None
        elif row["kind"] == EventKind.REFUSAL and row["from_state"] == state:
            waiting = _refusal(row)
    return {
        "layer": layer,
        "seed": seed_id,
        "generation": max([0, *(r["generation"] + (r["kind"] == EventKind.REPLANT) for r in rows)]),
        "state": None if state is None else state.name,
        "strategy": _strategy(rows),
        "history": history,
        "waiting": waiting,
        "continues": source,
    }


def _strategy(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Name of the strategy that the seed was planted with, in its present generation."""
    given = [row["strategy"] for row in rows if row["kind"] in _MOVES and row["strategy"] >= 0]
    if not given:
        return None
    known = STRATEGIES.get(given[-1])
    return known.name if known else f"number {given[-1]}"


def _first_state(rows: Sequence[Mapping[str, Any]], *, elsewhere: bool) -> ExtendedLifecycle | None:
    """The state that the log begins with; None if it began elsewhere and does not say."""
    if not elsewhere:
        return ExtendedLifecycle.DORMANT
    told = (row["from_state"] for row in rows if row["from_state"] >= 0)
    first = next(told, None)
    return None if first is None else ExtendedLifecycle[_state(first)]


def _seed_events(log: RunLog, layer: str, seed_id: int, upto: int | None) -> Events:
    known: set[str] = set()
    seeds, own = 0, []
    for events in _parts(log, upto):
        known.update(name for name in events.columns["layer"] if name)
        of_layer = events.of(layer)
        epochs = of_layer.take(of_layer.columns["kind"] == EventKind.EPOCH)
        seeds = max(seeds, *epochs.columns["errors"].tolist(), 0)
        own.append(of_layer.take(of_layer.columns["seed_id"] == seed_id))
    if layer not in known:
        raise _unknown_layer(log, layer, sorted(known))
    found = Events.concatenate(own)
    if seed_id < 0 or (seed_id >= seeds and not len(found)):
        raise ConfigError(
            f"layer {layer!r} has no seed {seed_id}",
            f"its seeds are 0 to {seeds - 1}" if seeds else "no seed of it has an event yet",
        )
    return found


def _parts(log: RunLog, upto: int | None) -> Iterator[Events]:
    parts = log.log_parts(upto)
    if not parts and not log.lineage():
        raise CheckpointNotFound(f"no checkpoint is stored at {log.root.url}", "check the URL")
    for _, ref in parts:
        yield _read(log, ref)


def _read(log: RunLog, ref: LogRef) -> Events:
    data = log.read_log(ref)
    try:
        events = decode(data)
    except CorruptError as error:
        raise CorruptError(f"{log.root.url}/{ref.path}: {error}", error.hint) from error
    if len(events) != ref.rows:
        raise CorruptError(f"{log.root.url}/{ref.path} has {len(events)} rows, not {ref.rows}")
    return events


def _unknown_layer(log: RunLog, layer: str, known: list[str]) -> ConfigError:
    if not known:
        return ConfigError(
            f"no event is stored at {log.root.url}",
            "runs of older versions have no event log; train on with this one",
        )
    near = difflib.get_close_matches(layer, known, n=3, cutoff=0.0)
    return ConfigError(f"no event names a layer {layer!r}", f"the nearest are {', '.join(near)}")


def _rows(events: Events) -> Iterator[dict[str, Any]]:
    columns = {
        name: values if isinstance(values, list) else values.tolist()
        for name, values in events.columns.items()
    }
    for at in range(len(events)):
        yield {name: values[at] for name, values in columns.items()}


def _move(row: Mapping[str, Any]) -> dict[str, Any]:
    replant = row["kind"] == EventKind.REPLANT
    return {
        "epoch": row["epoch"],
        "step": row["step"],
        "from": _state(row["from_state"]),
        "to": ExtendedLifecycle.DORMANT.name if replant else _state(row["to_state"]),
        "cause": "REPLANT" if replant else row["cause"],
        "gate": parse_gate(row["gate"]),
        "alpha": _finite(row["alpha"]),
        "score": _finite(row["score"]),
    }


def _refusal(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "epoch": row["epoch"],
        "step": row["step"],
        "to": _state(row["to_state"]),
        "cause": row["cause"],
        "gate": parse_gate(row["gate"]),
    }


def _state(number: int) -> str:
    try:
        return ExtendedLifecycle(number).name
    except ValueError as error:
        raise CorruptError(f"the event log holds a state {number}, which does not exist") from error


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def explain_text(document: Mapping[str, Any]) -> str:
    """The document of `explain` in words: a line for each move, then why the seed is there."""
    state, generation = document["state"] or "unknown", document["generation"]
    lines = [f"{document['layer']}, seed {document['seed']}, generation {generation}: {state}"]
    if document["strategy"]:
        lines[0] += f", grafting {document['strategy']}"
    if document["continues"]:
        lines.append(f"continues {document['continues']}, whose log tells what came before")
    lines += [*(_move_line(move) for move in document["history"]), _reason(document)]
    # Stored text reaches a terminal here: it shall hold no escape sequences.
    return "\n".join(
        "".join(character if character.isprintable() else "?" for character in line)
        for line in lines
    )


def _move_line(move: Mapping[str, Any]) -> str:
    epoch = move["epoch"] + 1  # counted from 1, as a run's progress is shown
    line = f"epoch {epoch:>4}  {move['from']} -> {move['to']}  {move['cause'].lower()}"
    return f"{line}  {_judged(move['gate'])}" if move["gate"] else line


def _judged(gate: Gate) -> str:
    inputs, rules = gate["inputs"], gate["thresholds"]
    clauses = [
        _clause(name, inputs.get(name), rules.get(name, ""))
        for name in [*rules, *(name for name in inputs if name not in rules)]
    ]
    return f"{gate['name']} gate: {', '.join(clauses)}"


def _clause(name: str, value: float | None, rule: str) -> str:
    if value is None:
        return f"{name} not measured ({rule})" if rule else f"{name} not measured"
    return f"{name} {value:.6g} {rule}".rstrip()


def _reason(document: Mapping[str, Any]) -> str:
    if document["state"] is None:
        return "no event here names it"
    state, waiting = ExtendedLifecycle[document["state"]], document["waiting"]
    if state in TERMINAL_STATES and document["history"]:
        last = document["history"][-1]
        verdict = _judged(last["gate"]) if last["gate"] else "no gate"
        return (
            f"ended: {state.name} in epoch {last['epoch'] + 1}, {last['cause'].lower()}, {verdict}"
        )
    if waiting is None:
        return "waits: no request was refused since the last commit"
    why = f": {waiting['gate']['verdict']}" if waiting["gate"] else ""
    return f"waits: {waiting['to']} was refused in epoch {waiting['epoch'] + 1}{why}"
