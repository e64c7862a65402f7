"""Any object of a stored run, damaged by accident or by intent: refused, restored, never taken."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.hostile import forgeries
from tests.hostile.stored_run import make_run
from tests.pages import ROOT

MEMORY_BOUND = 128 * 2**20
"""Bytes by which a process may grow over all the damaged stores that it reads."""


@pytest.fixture(scope="session")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stored run in `run`, a signed one in `signed`, hostile tables in `tables`."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "key").write_bytes(b"0123456789abcdef")
    make_run(folder / "run")
    make_run(folder / "signed", signing_key_file=str(folder / "key"))
    (folder / "tables").mkdir()
    for name, data in forgeries.arrow_files().items():
        (folder / "tables" / f"{name}.bin").write_bytes(data)
    return folder


def read_damaged(
    stored: Path, seed: int, first: int, last: int, timeout: int, run: str = "run"
) -> dict[str, Any]:
    """Outcomes of the damaged stores of these numbers, read in a process of their own."""
    places = [str(stored / name) for name in (run, "tables")]
    numbers = [str(number) for number in (seed, first, last)]
    key = {"signing_key_file": str(stored / "key")} if run == "signed" else {}
    done = subprocess.run(
        [sys.executable, "-m", "tests.hostile.child", *places, *numbers, json.dumps(key)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"{lines[-1:]}: {done.returncode}: {done.stderr[-3000:]}"
    told: dict[str, Any] = json.loads(lines[-1])
    return told


def check(told: dict[str, Any], count: int) -> None:
    """Every store has an outcome, of every kind some, and the process did not grow."""
    outcomes = told["outcomes"]
    assert sum(outcomes.values()) == count
    assert told["grown"] < MEMORY_BOUND
    assert any(name.startswith("refused") for name in outcomes)
    assert outcomes["restored from the commit before"] > count // 5


def test_300_damaged_stores_are_refused_or_restored(stored: Path) -> None:
    check(read_damaged(stored, 1, 0, 260, timeout=100), 260)


def test_a_signature_refuses_what_only_its_writer_could_know_better(stored: Path) -> None:
    told = read_damaged(stored, 1, 260, 300, timeout=100, run="signed")
    check(told, 40)
    assert not [name for name in told["outcomes"] if name.startswith("legal")]


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("run", "part"), [("run", 0), ("run", 1), ("run", 2), ("signed", 3)])
def test_10000_damaged_stores_are_refused_or_restored(stored: Path, run: str, part: int) -> None:
    first = part * 2_500
    check(read_damaged(stored, 2, first, first + 2_500, 1_200, run), 2_500)
