"""`esper-ray checkpoints import` as a user meets it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.legacy.old_store import record, record_v1, save

if TYPE_CHECKING:
    from tests.cli.conftest import Command


class Runs:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


@pytest.fixture
def old(here: Path) -> Path:
    folder = here / "old"
    folder.mkdir()
    save(folder, record())
    save(folder, record_v1(4, seed_id=0))
    return folder


def test_records_are_imported_with_a_report(cli: Command, old: Path) -> None:
    torch.save({"state_data": Runs(old / "ran")}, old / "evil_1_1.pt")
    done = cli("checkpoints", "import", "old", "new", "--allow-legacy-pt", "--json")
    assert done.code == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["layers"] == {"encoder.3_b": {"DORMANT": 1, "GRAFTING": 1, "FOSSILIZED": 1}}
    outcomes = {entry["file"]: entry["outcome"] for entry in told["files"]}
    assert outcomes.pop("evil_1_1.pt") == "refused"
    assert set(outcomes.values()) == {"imported"}
    assert not (old / "ran").exists()
    for words in (("list",), ("verify",), ("show",)):
        assert cli("checkpoints", *words, "new").code == 0


def test_the_report_in_words_says_what_was_mapped_and_what_was_not(cli: Command, old: Path) -> None:
    torch.save({"state_data": {}}, old / "bad_1_1.pt")
    done = cli("checkpoints", "import", "old", "new", "--allow-legacy-pt")
    lines = done.stdout.splitlines()
    assert "refused: bad_1_1.pt" in lines
    assert "  its layer_id is None" in lines
    assert any(line.startswith("imported: ") and "seed 0, version 1" in line for line in lines)
    assert "encoder.3_b: 1 DORMANT, 1 GRAFTING, 1 FOSSILIZED" in lines
    assert lines[-1].endswith("new@step=0")


def test_pt_files_need_a_word_of_the_user(cli: Command, old: Path, here: Path) -> None:
    error, hint = cli("checkpoints", "import", "old", "new").failed(4)
    assert "2 .pt files, which are pickles" in error
    assert "--allow-legacy-pt" in hint
    assert not (here / "new").exists()


def test_what_is_stored_already_is_left_alone(cli: Command, old: Path, store: Path) -> None:
    before = sorted(store.rglob("*"))
    cli("checkpoints", "import", "old", str(store), "--allow-legacy-pt").failed(2)
    assert sorted(store.rglob("*")) == before
