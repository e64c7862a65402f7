"""Where a run starts: newest valid commit, fresh, or what --resume names."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.cli.conftest import Command, Snapshot

TRAIN = ("train", "run.yaml", "--local")


def commit(store: Path, seq: int) -> Path:
    return store / "commits" / f"{seq:020d}.json"


def segment(store: Path, seq: int, name: str) -> Path:
    body = json.loads(commit(store, seq).read_text())
    if name == "log":
        return Path(store / "log" / body["log"]["file"])
    files: dict[str, str] = {ref["name"]: ref["file"] for ref in body["segments"]}
    return store / "segments" / files[name]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x20
    path.write_bytes(data)


def document(cli: Command, *words: str) -> dict[str, Any]:
    done = cli(*TRAIN, "--json", *words)
    assert done.code == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_auto_starts_fresh_and_says_so_where_nothing_is_stored(cli: Command, here: Path) -> None:
    done = cli(*TRAIN, "--set", "train.epochs=1")
    assert done.code == 0
    assert f"nothing is stored at file://{here}/store: starting fresh" in done.stderr


def test_finished_run_is_resumed_without_a_step(
    cli: Command, store: Path, finished_run: Path
) -> None:
    done = cli(*TRAIN, "--json")
    found = json.loads(done.stdout)
    assert (found["steps"], found["status"]) == (10, "completed")
    assert found["checkpoint"] == f"file://{store}@step=10"
    assert "resuming file://" in done.stderr
    assert "epoch " not in done.stderr
    assert len(list((store / "commits").iterdir())) == 4


def test_longer_run_goes_on_where_the_shorter_one_ended(
    cli: Command, store: Path, here: Path
) -> None:
    whole = document(cli, "--set", "train.epochs=7", "--set", "storage.url=whole")
    resumed = document(cli, "--set", "train.epochs=7")
    for key in ("steps", "eval", "seeds", "states_visited", "transitions"):
        assert resumed[key] == whole[key]


@pytest.mark.parametrize(
    "part",
    ["commit", "log", "layer/reader.hidden/weights", "layer/reader.hidden/grafting", "stage0/host"],
)
def test_auto_falls_back_past_damage_and_stores_a_whole_checkpoint_again(
    cli: Command, store: Path, part: str
) -> None:
    intact = document(cli)
    path = commit(store, 4) if part == "commit" else segment(store, 4, part)
    flip(path)
    done = cli(*TRAIN, "--json")
    assert re.search(rf"checkpoint 4 is damaged and is passed over: .*{path.name}", done.stderr)
    assert "resuming file://" in done.stderr
    assert "at step 8" in done.stderr
    again = json.loads(done.stdout)
    assert {**again, "wall_s": 0} == {**intact, "wall_s": 0}
    assert cli("checkpoints", "show", "store@step=10").code == 0


def test_auto_falls_back_past_a_missing_segment(cli: Command, store: Path) -> None:
    segment(store, 4, "metrics").unlink()
    done = cli(*TRAIN)
    assert done.code == 0
    assert "checkpoint 4 is damaged and is passed over" in done.stderr
    assert cli("checkpoints", "verify", "store").stdout.startswith("ok: ")


def test_auto_refuses_where_all_is_damaged(
    cli: Command, store: Path, everything: Callable[[], Snapshot]
) -> None:
    for seq in (1, 2, 3, 4):
        flip(commit(store, seq))
    before = everything()
    done = cli(*TRAIN)
    error, hint = done.failed(4)
    assert "all 4 checkpoints" in error
    assert "another URL" in hint
    assert [f"checkpoint {n} is damaged" in done.stderr for n in (4, 3, 2, 1)] == [True] * 4
    assert done.stdout == ""
    assert everything() == before


def test_auto_in_a_process_falls_back_and_says_so(command: Command, store: Path) -> None:
    flip(segment(store, 4, "stage1/host"))
    done = command(*TRAIN, "--json")
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 10
    assert "checkpoint 4 is damaged and is passed over" in done.stderr


def test_never_starts_at_the_beginning_and_hides_the_older_history(
    cli: Command, store: Path
) -> None:
    done = cli(*TRAIN, "--resume", "never", "--set", "train.epochs=2")
    assert done.code == 0
    assert "resuming" not in done.stderr
    assert f"4 checkpoints of earlier starts at file://{store} are set aside" in done.stderr
    rows = json.loads(cli("checkpoints", "list", "store", "--json").stdout)["checkpoints"]
    assert [(row["seq"], row["step"]) for row in rows] == [(5, 4)]


def test_resume_of_an_older_step_gives_up_what_came_after(cli: Command, store: Path) -> None:
    done = cli(*TRAIN, "--json", "--resume", "store@step=8")
    assert json.loads(done.stdout)["steps"] == 10
    assert "at step 8" in done.stderr
    rows = json.loads(cli("checkpoints", "list", "store", "--json").stdout)["checkpoints"]
    assert [row["seq"] for row in rows] == [5, 3, 2, 1]
    assert cli("checkpoints", "verify", "store").code == 0


def test_a_resumed_older_step_opens_a_new_line_that_is_then_the_latest(
    cli: Command, store: Path
) -> None:
    given_up = commit(store, 4).read_bytes()
    done = cli(*TRAIN, "--resume", "store@step=8", "--set", "train.epochs=7")
    assert done.code == 0, done.stderr
    rows = json.loads(cli("checkpoints", "list", "store", "--json").stdout)["checkpoints"]
    assert [(row["seq"], row["step"]) for row in rows[:3]] == [(6, 14), (5, 12), (3, 8)]
    for selector in ("", "@latest", "@step=14"):
        shown = json.loads(cli("checkpoints", "show", f"store{selector}", "--json").stdout)
        assert (shown["seq"], shown["step"]) == (6, 14)
    cli("checkpoints", "show", "store@step=10").failed(3)  # of the line that was given up
    assert commit(store, 4).read_bytes() == given_up
    for resume in ("auto", "store@latest"):
        again = cli(*TRAIN, "--resume", resume, "--set", "train.epochs=7")
        assert "at step 14" in again.stderr
    assert cli("checkpoints", "verify", "store").code == 0


def test_resume_from_another_place_stores_in_its_own(
    cli: Command, store: Path, everything: Callable[[], Snapshot]
) -> None:
    before = everything()
    words = ("--resume", f"file://{store}@latest", "--set", "storage.url=branch")
    found = document(cli, *words, "--set", "train.epochs=6")
    assert found["checkpoint"].endswith("/branch@step=12")
    after = everything()
    assert {name: after[name] for name in before} == before
    assert cli("checkpoints", "verify", "branch").code == 0


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("seeds.hidden=8", "seeds.hidden"),
        ("seeds.grafting.ramp_epochs=3", "seeds.grafting.ramp_epochs"),
        ("model.args={window: 4, embedding: 4, hidden: 32}", "model.args.hidden"),
        ("lifecycle.gates={delta_ratio_max: 9.0}", "lifecycle.gates.delta_ratio_max"),
        ("data.batch_size=32", "data.batch_size"),
        ("train.lr=1e-3", "train.lr"),
        ("seed=4", "seed"),
    ],
)
@pytest.mark.parametrize("resume", ["auto", "store@step=8"])
def test_changed_key_is_named_and_nothing_is_written(
    cli: Command,
    store: Path,
    everything: Callable[[], Snapshot],
    override: str,
    key: str,
    resume: str,
) -> None:
    before = everything()
    done = cli(*TRAIN, "--resume", resume, "--set", override)
    error, hint = done.failed(2)
    assert key in error
    assert "--resume never" in hint
    assert everything() == before


def test_length_and_place_may_change(cli: Command, store: Path) -> None:
    words = ["--set", "train.epochs=6", "--set", "storage.every_epochs=1"]
    assert document(cli, *words, "--set", "cluster.step_timeout_s=60")["steps"] == 12


def test_checkpoint_past_the_end_is_refused(cli: Command, store: Path) -> None:
    error, hint = cli(*TRAIN, "--set", "train.epochs=2").failed(2)
    assert "epoch 5" in error
    assert hint == "hint: set train.epochs to at least 5"


def test_summary_ends_with_a_command_that_restores(cli: Command, here: Path) -> None:
    (here / "my run.yaml").write_text((here / "run.yaml").read_text())
    words = ("--local", "--set", "seeds.targets=[reader.hidden]", "--set", "train.epochs=1")
    done = cli("train", "my run.yaml", *words)
    program, *restore = shlex.split(done.stdout.splitlines()[-1].removeprefix("restore: "))
    assert program == "esper-ray"
    again = cli(*restore)
    assert again.code == 0, again.stderr
    assert "at step 2" in again.stderr


def test_run_whose_blueprint_is_chosen_for_it_goes_on(cli: Command, here: Path) -> None:
    text = (here / "run.yaml").read_text()
    (here / "run.yaml").write_text(text.replace("  blueprint: bottleneck\n", ""))
    words = ("train", "run.yaml", "--local", "--set", "storage.url=chosen", "--set")
    assert cli(*words, "train.epochs=2").code == 0
    resumed = cli(*words, "train.epochs=3")
    assert resumed.code == 0, resumed.stderr
    assert "at step 4" in resumed.stderr
