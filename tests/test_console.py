"""What people read while and after a run: lines, tables, and the live terminal."""

from __future__ import annotations

import io
import sys
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from esper_ray import console
from esper_ray.actors.run_point import RunResult
from esper_ray.config import parse_config
from esper_ray.console import Progress, epoch_line, summary, text_table
from esper_ray.data import DatasetCard
from esper_ray.events.messages import EpochReport
from esper_ray.runtime import LN2

CARD = DatasetCard(
    name="letters",
    source="a drawer",
    licence="none",
    metric="bits_per_byte",
    bytes=3_000,
    sha256="ab" * 32,
    splits={"train": 2_000, "gate": 600, "test": 400},
)
REPORT = EpochReport(
    epoch=4,
    step=40,
    losses=(2.0, 3.0),
    gate_loss=2 * LN2,
    gate_accuracy=0.5,
    seeds={"a.[/x]": {"DORMANT": 1, "TRAINING": 3}, "b": {"DORMANT": 4}},
    moves=(),
    transitions=6,
    states_visited=("DORMANT", "GERMINATED", "TRAINING"),
    commit=None,
)
RESULT = RunResult(
    run="a",
    status="completed",
    steps=80,
    wall_s=12.6,
    eval={"bits_per_byte": 2.34567, "samples": 64},
    seeds={"b": {"FOSSILIZED": 1, "CULLED": 3}},
    states_visited=("DORMANT", "FOSSILIZED"),
    transitions=9,
    checkpoint="file:///some where@step=80",
)


# ------------------------------------------------------------------ one epoch


def test_epoch_line_adds_up_the_seeds_of_all_layers() -> None:
    assert epoch_line(REPORT, 100, "bits_per_byte") == (
        "epoch    5/100  loss 2.5000   2.000 bits/byte  DORMANT:5 TRAINING:3"
    )


def test_epoch_line_of_a_table_shows_accuracy_and_what_was_saved() -> None:
    line = epoch_line(replace(REPORT, commit=7), 9, "accuracy")
    assert line == "epoch    5/9  loss 2.5000   50.0% correct  DORMANT:5 TRAINING:3  saved #7"


def test_epoch_line_survives_an_epoch_without_numbers() -> None:
    line = epoch_line(replace(REPORT, losses=(), gate_loss=float("nan")), 9, "bits_per_byte")
    assert "loss 0.0000     nan bits/byte" in line


# ------------------------------------------------------------------ progress


def test_lines_go_to_stderr_where_nobody_watches(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(9, CARD) as progress:
        progress.show(REPORT)
        progress.show(replace(REPORT, epoch=5))
    printed = capsys.readouterr()
    assert printed.out == ""
    first, *epochs = printed.err.splitlines()
    assert first == ("data letters: train 2,000, gate 600, test 400 bytes, sha256 abababababababab")
    assert [line[:12] for line in epochs] == ["epoch    5/9", "epoch    6/9"]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What a terminal of 40 columns receives."""
    screen = io.StringIO()

    def on_terminal(**options: Any) -> Console:
        del options["stderr"]
        return Console(file=screen, force_terminal=True, width=40, **options)

    monkeypatch.setattr(console, "Console", on_terminal)
    return screen


def test_terminal_shows_lines_and_a_live_table(terminal: io.StringIO) -> None:
    with Progress(9, CARD) as progress:
        progress.show(REPORT)
        progress.show(replace(REPORT, epoch=5))
    seen = terminal.getvalue()
    assert "epoch    6/9  loss 2.5000   2.000 bits/byte  DORMANT:5 TRAINING:3\n" in seen
    assert "a.[/x]" in seen  # names are no markup
    assert "1 DORMANT, 3 TRAINING" in seen


def test_terminal_is_left_as_it_was_after_a_failure(terminal: io.StringIO) -> None:
    streams = sys.stdout, sys.stderr
    fault: Any = object()
    with pytest.raises(AttributeError), Progress(9, CARD) as progress:
        progress.show(fault)
    assert (sys.stdout, sys.stderr) == streams
    assert terminal.getvalue().count("\x1b[?25l") == terminal.getvalue().count("\x1b[?25h")


# ------------------------------------------------------------------ the end


def test_summary_ends_with_where_the_run_is_and_how_to_go_on() -> None:
    config = parse_config(
        {
            "run": "a",
            "lifecycle": {"gates": {"stability_min": 0.5}, "minimum_epochs": {"TRAINING": 3}},
        }
    )
    assert summary(config, "esper-ray train 'my run.yaml'", RESULT).splitlines() == [
        "a: 80 steps in 13 s",
        "test: bits_per_byte 2.346, samples 64",
        "b: 1 FOSSILIZED, 3 CULLED",
        "9 transitions through DORMANT, FOSSILIZED",
        "not at default: stability_min 0.5, TRAINING 3",
        "checkpoint: file:///some where@step=80",
        "restore: esper-ray train 'my run.yaml' --resume 'file:///some where@step=80'",
    ]


def test_summary_does_not_speak_of_defaults_that_were_kept() -> None:
    assert "default" not in summary(parse_config({"run": "a"}), "esper-ray train x", RESULT)


# ------------------------------------------------------------------ tables


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    table = text_table(["a", "bbb"], [["1", "2"], ["long", "x"]])
    assert table.splitlines() == ["a     bbb", "1     2", "long  x"]


def test_table_without_rows_is_its_header() -> None:
    assert text_table(["a", "b"], []) == "a  b"


def test_no_checkpoints_are_said_in_words() -> None:
    assert console.checkpoint_table([]) == "no checkpoints"
