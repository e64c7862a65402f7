"""Writes the pages that are made from the code: `python -m docs.generate [--check]`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from esper_ray.lifecycle import (
    GATES,
    MINIMUM_EPOCHS,
    TERMINAL_STATES,
    ExtendedLifecycle,
    GateSettings,
    StateTransition,
)

PAGE = Path(__file__).with_name("lifecycle.md")

HEAD = """\
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
    yield "| move | gate |"
    yield "|---|---|"
    for (source, target), gate in GATES.items():
        rule = (gate.__doc__ or "").partition(":")[2].split("\n\n")[0]
        yield f"| {source.name} to {target.name} | {' '.join(rule.split())} |"


def _thresholds() -> Iterator[str]:
    yield "| threshold | default |"
    yield "|---|---:|"
    for field in fields(GateSettings):
        yield f"| `{field.name}` | {field.default} |"


def lifecycle_page() -> str:
    """The text of docs/lifecycle.md."""
    parts = [
        [HEAD],
        _diagram(),
        ["", "## States", ""],
        _states(),
        ["", WAIVED, "## Gates", ""],
        _gates(),
        ["", FAIL_CLOSED],
        _thresholds(),
    ]
    return "\n".join(line for part in parts for line in part) + "\n"


def main(arguments: list[str]) -> int:
    """Write the page, or with `--check` only say whether it is current."""
    page = lifecycle_page()
    if "--check" not in arguments:
        PAGE.write_text(page, encoding="utf-8")
        return 0
    if PAGE.exists() and PAGE.read_text(encoding="utf-8") == page:
        return 0
    sys.stderr.write(f"error: docs/{PAGE.name} is stale\nhint: make docs\n")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
