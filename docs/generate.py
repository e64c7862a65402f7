"""Writes the pages that are made from the code: `python -m docs.generate [--check]`."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from esper_ray.config import RunConfig
from esper_ray.lifecycle import (
    GATES,
    MINIMUM_EPOCHS,
    TERMINAL_STATES,
    Clause,
    ExtendedLifecycle,
    Gate,
    GateSettings,
    Shut,
    StateTransition,
    gate_of,
)

FOLDER = Path(__file__).parent

LIFECYCLE = """\
# The life of a seed

<!-- Written by `make docs` from esper_ray/lifecycle. Do not edit. -->

A seed is in one of eleven states. `StateTransition.VALID_TRANSITIONS` is the only table of moves;
the state tensor, the tests and this page are made from it. A move must be in the table, the seed
must have spent the minimum number of lifecycle epochs in its state, and the move's gate, where it
has one, must pass. A refused move is a value with a reason, not an error.
"""

WAIVED = """\
The minimum is waived for moves to ROLLED_BACK and CANCELLED, and to CULLED after an error. Terminal
states are never left. Minima and thresholds shown here are the defaults; a run may set its own.
"""

FAIL_CLOSED = """\
A gate reads measured numbers only: a missing or non-finite number fails the clause that needs it.
"""


def _diagram() -> Iterator[str]:
    yield "```mermaid"
    yield "stateDiagram-v2"
    yield f"    [*] --> {ExtendedLifecycle(0).name}"
    for source, targets in StateTransition.VALID_TRANSITIONS.items():
        for target in targets:
            yield f"    {source.name} --> {target.name}"
    for state in ExtendedLifecycle:
        if state in TERMINAL_STATES:
            yield f"    {state.name} --> [*]"
    yield "```"


def _states() -> Iterator[str]:
    yield "| code | state | minimum epochs | next |"
    yield "|---:|---|---:|---|"
    for state in ExtendedLifecycle:
        minimum = "-" if state in TERMINAL_STATES else MINIMUM_EPOCHS.get(state, 0)
        targets = ", ".join(t.name for t in StateTransition.VALID_TRANSITIONS[state])
        yield f"| {state.value} | {state.name} | {minimum} | {targets or 'terminal'} |"


def _gates() -> Iterator[str]:
    yield "| move | gate | opens when |"
    yield "|---|---|---|"
    for (source, target), gate in GATES.items():
        for each in dict.fromkeys((gate, gate_of(source, target, "reconstruction") or gate)):
            move = f"{source.name} to {target.name}"
            yield f"| {move} | `{each.name}`: {each.about} | {_ways(each)} |"


def _ways(gate: Gate) -> str:
    return ", or ".join(" and ".join(map(_condition, way)) for way in gate.ways)


def _condition(condition: Clause | Shut) -> str:
    if isinstance(condition, Shut):
        return f"`{condition.gate.name}` stays shut"
    if condition.limit == math.inf:
        return f"`{condition.metric}` is finite"
    limit = f"`{condition.limit}`" if isinstance(condition.limit, str) else f"{condition.limit:g}"
    return f"`{condition.metric}` {condition.relation} {limit}"


def _thresholds() -> Iterator[str]:
    yield "| threshold | default |"
    yield "|---|---:|"
    for field in fields(GateSettings):
        yield f"| `{field.name}` | {field.default} |"


def lifecycle_page() -> str:
    """The text of docs/lifecycle.md."""
    parts = [
        [LIFECYCLE],
        _diagram(),
        ["", "## States", ""],
        _states(),
        ["", WAIVED, "## Gates", ""],
        _gates(),
        ["", FAIL_CLOSED],
        _thresholds(),
    ]
    return "\n".join(line for part in parts for line in part) + "\n"


CONFIGURATION = """\
# The run file

<!-- Written by `make docs` from esper_ray/config/schema.py. Do not edit. -->

YAML of at most 1 MiB, without aliases and tags. An unknown key is refused, and the nearest valid
one named. `--set section.key=value` overrides a key; the value is YAML. `esper-ray plan CONFIG`
checks a file and starts nothing. A whole one: [stdlib_lm.yaml](../examples/stdlib_lm.yaml).
"""

RESUME = """
A run may be resumed with other values of `train.epochs`, `storage`, `cluster` and `events`. Every
other key is part of what the run is.
"""


def _section(kind: type[BaseModel], name: str = "") -> Iterator[str]:
    yield f"## `{name}`" if name else "## Top level"
    yield from (
        "",
        (kind.__doc__ or "").strip(),
        "",
        "| key | default | meaning |",
        "|---|---|---|",
    )
    inner: dict[str, type[BaseModel]] = {}
    for key, field in kind.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            inner[key] = field.annotation
            continue
        meaning = " ".join((field.description or "").split())
        yield f"| `{key}` | {_default(field)} | {meaning} |"
    for key, section in inner.items():
        yield ""
        yield from _section(section, f"{name}.{key}".lstrip("."))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return f"`{json.dumps(field.get_default(call_default_factory=True))}`"


def configuration_page() -> str:
    """The text of docs/configuration.md."""
    return "\n".join([CONFIGURATION, *_section(RunConfig), RESUME])


PAGES: Mapping[str, Callable[[], str]] = {
    "lifecycle.md": lifecycle_page,
    "configuration.md": configuration_page,
}


def main(arguments: list[str]) -> int:
    """Write the pages, or with `--check` only say which are not current."""
    stale = 0
    for name, make in PAGES.items():
        page, path = make(), FOLDER / name
        if "--check" not in arguments:
            path.write_text(page, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != page:
            sys.stderr.write(f"error: docs/{name} is stale\nhint: make docs\n")
            stale = 1
    return stale


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
