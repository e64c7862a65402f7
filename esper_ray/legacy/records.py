"""The `.pt` records of the seed documents, versions 1 and 2, as checked values of one seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from torch import Tensor

from esper_ray.errors import MigrationError
from esper_ray.grafting import STRATEGIES
from esper_ray.lifecycle import BLENDED_STATES, ExtendedLifecycle
from esper_ray.seeds.phase1 import TO_PHASE2, Phase1State
from esper_ray.storage.migrations import migrate

NEWEST: Final = 2
MAX_SEEDS: Final = 1_000_000
_MILLISECONDS: Final = 1e11
_CLOCK_S: Final = 2.0
_MAX_NAME: Final = 255

Codes = Literal["phase1", "identity"]

RANGES: Final[Mapping[str, tuple[int, int]]] = {
    "lifecycle_state": (0, 10),
    "blueprint_id": (-1, 2**31 - 1),
    "epochs_in_state": (0, 2**31 - 1),
    "grafting_strategy": (min(STRATEGIES), max(STRATEGIES)),
    "parent_state": (-1, 10),
    "evaluation_score": (-(2**31), 2**31 - 1),
    "error_count": (0, 2**31 - 1),
    "generation": (0, 2**15 - 2),
}
_METRICS: Final = ("loss", "accuracy", "stability", "efficiency")
_UNMAPPED: Final = {
    "checkpoint_id": "it numbers a file of the old store",
    "transition_history": "its entries had another form",
    "transition_count": "the history that it counts is not mapped",
}


@dataclass(frozen=True, slots=True)
class Record:
    """One seed: its columns, its alpha and metrics if they are told, its blueprint's tensors."""

    layer_id: str
    seed_id: int
    timestamp_s: float
    version: int
    columns: Mapping[str, int]
    alpha: float | None
    metrics: tuple[float, ...] | None
    tensors: Mapping[str, Tensor]
    notes: tuple[str, ...]


def v1_to_v2(codes: Codes) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The step from version 1; "phase1" maps the code under `state`, "identity" keeps it."""

    def step(record: dict[str, Any]) -> dict[str, Any]:
        data = record.get("state_data")
        if not isinstance(data, dict):
            raise MigrationError(f"its state_data is a {type(data).__name__}, not a dict")
        data = dict(data)
        old = data.pop("state", 0)
        if "lifecycle_state" not in data:
            data["lifecycle_state"] = _mapped(old) if codes == "phase1" else old
        return {**record, "version": 2, "priority": "normal", "state_data": data}

    return step


def _mapped(code: object) -> int:
    if type(code) is not int or not 0 <= code < len(Phase1State):
        raise MigrationError(f"its state is {code!r}, Phase 1 has 0 to 4")
    return int(TO_PHASE2[Phase1State(code)])


def read_record(payload: object, stem: str, codes: Codes = "phase1") -> Record:
    """The seed that a loaded file tells of; MigrationError or TooNewError where it is refused.

    `stem` is the file's name without `.pt`; the ids in the payload must be those in it.
    """
    if not isinstance(payload, dict) or "state_data" not in payload:
        raise MigrationError("it holds neither a record of a seed nor a Phase 1 table")
    version = payload.get("version", 1)
    oldest = type(version) is int and version < 1
    known = migrate(dict(payload), 1 if oldest else version, NEWEST, {1: v1_to_v2(codes)})
    layer_id, seed_id = known.get("layer_id"), known.get("seed_id")
    if not isinstance(layer_id, str) or not 1 <= len(layer_id) <= _MAX_NAME:
        raise MigrationError(f"its layer_id is {layer_id!r}")
    if type(seed_id) is not int or not 0 <= seed_id < MAX_SEEDS:
        raise MigrationError(f"its seed_id is {seed_id!r}, not in 0..{MAX_SEEDS - 1}")
    seconds = _seconds(known.get("timestamp"))
    _check_name(known, stem, f"{layer_id}_{seed_id}", seconds)
    data, notes = known["state_data"], list[str]()
    if not isinstance(data, dict):
        raise MigrationError(f"its state_data is a {type(data).__name__}, not a dict")
    columns = {name: _whole(name, data[name]) for name in RANGES if name in data}
    if "lifecycle_state" not in columns:
        raise MigrationError("its state_data has no lifecycle_state")
    return Record(
        layer_id,
        seed_id,
        seconds,
        1 if type(version) is int and version < NEWEST else NEWEST,
        columns,
        _alpha(data, columns["lifecycle_state"], notes),
        _metrics(data.get("performance_metrics")),
        _tensors(known.get("blueprint_state")),
        tuple(notes + _unmapped(data)),
    )


def _seconds(value: object) -> float:
    if type(value) not in (int, float) or not math.isfinite(value) or value < 0:  # type: ignore[arg-type,operator]
        raise MigrationError(f"its timestamp is {value!r}")
    number = float(value)  # type: ignore[arg-type]
    return number / 1000 if number > _MILLISECONDS else number


def _check_name(record: Mapping[str, Any], stem: str, ids: str, seconds: float) -> None:
    given = record.get("checkpoint_id", stem)
    if given != stem:
        raise MigrationError(f"its checkpoint_id is {given!r}, its file is named {stem!r}")
    named, _, time = stem.rpartition("_")
    if named != ids:
        raise MigrationError(f"it is of {ids!r}, its file is named {stem!r}")
    plain = time.isascii() and time.isdigit() and len(time) <= 15
    if not plain or abs(_seconds(int(time)) - seconds) > _CLOCK_S:
        raise MigrationError(f"it was written at {seconds:.0f} s, its file is named {stem!r}")


def _whole(name: str, value: object) -> int:
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_floating_point():
        value = value.item()
    low, high = RANGES[name]
    if type(value) is not int or not low <= value <= high:
        raise MigrationError(f"its {name} is {value!r}, not a whole number in {low}..{high}")
    return value


def _alpha(data: Mapping[str, Any], state: int, notes: list[str]) -> float | None:
    told = [data[name] for name in ("alpha", "alpha_blend") if data.get(name) is not None]
    if not told:
        return None
    value = told[0].item() if isinstance(told[0], Tensor) and told[0].numel() == 1 else told[0]
    if type(value) not in (int, float) or not 0 <= value <= 1:
        raise MigrationError(f"its alpha is {value!r}, not in [0, 1]")
    if state != ExtendedLifecycle.GRAFTING and value != (state in set(map(int, BLENDED_STATES))):
        notes.append(f"alpha {value:g} is not mapped: in its state it is always another")
    return float(value)


def _metrics(value: object) -> tuple[float, ...] | None:
    if value is None:
        return None
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, dict):
        value = [value.get(name) for name in _METRICS]
    if not isinstance(value, list) or len(value) != len(_METRICS):
        raise MigrationError("its performance_metrics are not four numbers")
    if not all(type(number) in (int, float) and math.isfinite(number) for number in value):
        raise MigrationError(f"its performance_metrics are {value!r}")
    return tuple(float(number) for number in value)


def _tensors(value: object) -> dict[str, Tensor]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise MigrationError(f"its blueprint_state is a {type(value).__name__}, not a dict")
    for name, tensor in value.items():
        if not isinstance(name, str) or not 1 <= len(name) <= _MAX_NAME:
            raise MigrationError(f"its blueprint_state has the name {name!r}")
        if not isinstance(tensor, Tensor):
            raise MigrationError(f"{name!r} of its blueprint_state is a {type(tensor).__name__}")
    return dict(value)


def _unmapped(data: Mapping[str, Any]) -> list[str]:
    mapped = {*RANGES, "alpha", "alpha_blend", "performance_metrics"}
    return [
        f"{str(name)[:80]} is not mapped: {_UNMAPPED.get(name, 'it is not of the seed documents')}"
        for name in data
        if name not in mapped
    ]
