"""`explain`: why a seed of a stored run is where it is, as text, as JSON, and where it cannot."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.cli.conftest import Command, Outcome, Snapshot

Look = Callable[[], "Snapshot"]
LAYERS = ("reader.hidden", "predictor.hidden")


def explain(cli: Command, run: str, layer: str, seed: object, *words: str) -> Outcome:
    return cli("explain", run, "--layer", layer, "--seed", str(seed), *words)


def document(done: Outcome) -> dict[str, Any]:
    assert done.code == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


# ------------------------------------------------------------------ what is told


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("seed", range(4))
def test_history_of_every_seed_is_told_as_one_document(
    cli: Command, store: Path, everything: Look, layer: str, seed: int
) -> None:
    before = everything()
    found = document(explain(cli, "store", layer, seed, "--json"))
    assert list(found) == [
        "layer",
        "seed",
        "generation",
        "state",
        "strategy",
        "history",
        "waiting",
        "continues",
    ]
    assert (found["layer"], found["seed"], found["generation"]) == (layer, seed, 0)
    reached = [move["to"] for move in found["history"]]
    assert reached[:3] == ["GERMINATED", "TRAINING", "GRAFTING"]
    assert reached[-1] == found["state"]
    assert [move["from"] for move in found["history"]] == ["DORMANT", *reached[:-1]]
    gate = found["history"][2]["gate"]
    assert (gate["name"], gate["verdict"]) == ("readiness", "accepted")
    assert gate["thresholds"]["delta_ratio"] == "<= 100"  # as the run file sets it
    assert everything() == before


def test_text_tells_each_move_and_why_the_seed_waits(cli: Command, store: Path) -> None:
    found = document(explain(cli, "store", LAYERS[0], 2, "--json"))
    done = explain(cli, "store", LAYERS[0], 2)
    assert (done.code, done.stderr) == (0, "")
    head, *moves, last = done.stdout.splitlines()
    assert found["strategy"] == "linear"
    assert head == f"reader.hidden, seed 2, generation 0: {found['state']}, grafting linear"
    assert moves[0] == "epoch    1  DORMANT -> GERMINATED  policy"
    assert moves[2].startswith("epoch    3  TRAINING -> GRAFTING  policy  readiness gate: ")
    assert "delta_ratio" in moves[2]
    assert len(moves) == len(found["history"])
    assert last.startswith("waits: ")


def test_seed_that_waits_is_told_with_its_refusal(cli: Command, here: Path) -> None:
    run = ("--set", "lifecycle.budgets={training_in_all: 3}", "--set", "train.epochs=2")
    assert cli("train", "run.yaml", "--local", *run).code == 0
    waiting = [
        (layer, seed)
        for layer in LAYERS
        for seed in range(4)
        if document(explain(cli, "store", layer, seed, "--json"))["state"] == "GERMINATED"
    ]
    assert len(waiting) == 5
    found = document(explain(cli, "store", *waiting[0], "--json"))
    assert found["waiting"]["to"] == "TRAINING"
    assert found["waiting"]["gate"]["verdict"] == "the budget of the target state is used up"
    text = explain(cli, "store", *waiting[0]).stdout
    assert text.splitlines()[-1] == (
        "waits: TRAINING was refused in epoch 2: the budget of the target state is used up"
    )


def test_run_is_named_or_given_by_its_url(cli: Command, here: Path, finished_run: Path) -> None:
    shutil.copytree(finished_run / "store", here / "runs" / "tiny" / "checkpoints")
    by_name = explain(cli, "tiny", LAYERS[0], 1)
    for url in ("runs/tiny/checkpoints", f"file://{here}/runs/tiny/checkpoints"):
        assert explain(cli, url, LAYERS[0], 1) == by_name
    assert by_name.code == 0
    assert cli("checkpoints", "verify", "tiny").code == 0  # names stand for URLs there too


def test_longer_run_is_told_to_its_new_end(cli: Command, store: Path) -> None:
    before = document(explain(cli, "store", LAYERS[0], 0, "--json"))
    assert cli("train", "run.yaml", "--local", "--set", "train.epochs=9").code == 0
    after = document(explain(cli, "store", LAYERS[0], 0, "--json"))
    assert after["history"][: len(before["history"])] == before["history"]
    assert len(after["history"]) > len(before["history"])


def test_process_prints_what_was_asked_for(command: Command, store: Path, cli: Command) -> None:
    words = ("explain", "store", "--layer", LAYERS[1], "--seed", "3")
    done = command(*words)
    assert (done.code, done.stderr) == (0, "")
    assert done.stdout == cli(*words).stdout


# ------------------------------------------------------------------ what cannot be told


def test_unknown_layer_is_refused_with_the_nearest_names(cli: Command, store: Path) -> None:
    done = explain(cli, "store", "reader.hiden", 0)
    error, hint = done.failed(2)
    assert error == "error: no event names a layer 'reader.hiden'"
    assert hint == "hint: the nearest are reader.hidden, predictor.hidden"
    assert done.stdout == ""


@pytest.mark.parametrize("seed", [4, -1, 2**40])
@pytest.mark.parametrize("form", [(), ("--json",)])
def test_seed_out_of_range_is_refused_with_those_that_exist(
    cli: Command, store: Path, seed: int, form: tuple[str, ...]
) -> None:
    done = explain(cli, "store", LAYERS[0], seed, *form)
    error, hint = done.failed(2)
    assert error == f"error: layer 'reader.hidden' has no seed {seed}"
    assert hint == "hint: its seeds are 0 to 3"
    assert done.stdout == ""


@pytest.mark.parametrize(
    "words", [("--layer", "a"), ("--seed", "0"), ("--layer", "a", "--seed", "x"), ()]
)
def test_words_that_are_missing_are_usage_errors(cli: Command, words: tuple[str, ...]) -> None:
    done = cli("explain", "store", *words)
    assert (done.code, done.stdout) == (2, "")
    assert done.stderr.startswith("Usage: ")


@pytest.mark.parametrize(
    "run", ["absent", "file:///tmp/esper-absent/run", "memory://absent/run", "store@latest"]
)
def test_nothing_stored_is_not_found(cli: Command, everything: Look, run: str) -> None:
    before = everything()
    done = explain(cli, run, LAYERS[0], 0)
    assert "no run is stored at" in done.failed(3)[0]
    assert done.stdout == ""
    assert everything() == before


def test_run_without_a_commit_is_not_found(cli: Command, store: Path) -> None:
    for manifest in (store / "commits").iterdir():
        manifest.unlink()
    assert "no checkpoint is stored at" in explain(cli, "store", LAYERS[0], 0).failed(3)[0]


@pytest.mark.parametrize("seq", [1, 4])
@pytest.mark.parametrize("where", [0.0, 0.5, 1.0])
def test_damaged_part_of_the_log_is_damage(
    cli: Command, store: Path, everything: Look, seq: int, where: float
) -> None:
    part = store / "log" / f"00000001-{seq:020d}.arrow"
    data = bytearray(part.read_bytes())
    data[int(where * (len(data) - 1))] ^= 0x01
    part.write_bytes(data)
    before = everything()
    done = explain(cli, "store", LAYERS[0], 0)
    assert part.name in done.failed(4)[0]
    assert done.stdout == ""
    assert everything() == before


def test_missing_part_of_the_log_is_damage(cli: Command, store: Path) -> None:
    (store / "log" / "00000001-00000000000000000002.arrow").unlink()
    assert "is missing" in explain(cli, "store", LAYERS[0], 0).failed(4)[0]


def test_log_can_be_told_again_after_a_resume_past_the_damage(cli: Command, store: Path) -> None:
    intact = explain(cli, "store", LAYERS[0], 0)
    part = store / "log" / "00000001-00000000000000000004.arrow"
    part.write_bytes(part.read_bytes()[:-1])
    explain(cli, "store", LAYERS[0], 0).failed(4)
    done = cli("train", "run.yaml", "--local")
    assert "checkpoint 4 is damaged and is passed over" in done.stderr
    assert explain(cli, "store", LAYERS[0], 0) == intact


def test_log_that_continues_another_says_where_the_story_begins(cli: Command, store: Path) -> None:
    words = ("--resume", "store@step=8", "--set", "storage.url=branch")
    assert cli("train", "run.yaml", "--local", *words).code == 0
    found = document(explain(cli, "branch", LAYERS[0], 2, "--json"))
    assert found["continues"] == f"file://{store}"
    whole = document(explain(cli, "store", LAYERS[0], 2, "--json"))
    assert whole["continues"] is None
    told = explain(cli, "branch", LAYERS[0], 2).stdout.splitlines()
    assert told[1] == f"continues file://{store}, whose log tells what came before"
    if found["history"]:
        assert found["state"] == whole["state"]
    else:
        assert found["state"] is None or found["state"] == whole["state"]
