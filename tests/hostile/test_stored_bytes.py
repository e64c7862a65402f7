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
    """A stored run in `run`, hostile tables in `tables`."""
    folder = tmp_path_factory.mktemp("hostile")
    make_run(folder / "run")
    (folder / "tables").mkdir()
    for name, data in forgeries.arrow_files().items():
        (folder / "tables" / f"{name}.bin").write_bytes(data)
    return folder


def read_damaged(stored: Path, seed: int, first: int, last: int, timeout: int) -> dict[str, Any]:
    """Outcomes of the damaged stores of these numbers, read in a process of their own."""
    places = [str(stored / name) for name in ("run", "tables")]
    numbers = [str(number) for number in (seed, first, last)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.hostile.child", *places, *numbers],
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
    assert sum(told["outcomes"].values()) == count
    assert told["grown"] < MEMORY_BOUND
    refused = sum(n for name, n in told["outcomes"].items() if name.startswith("refused"))
    assert refused > count // 10
    assert told["outcomes"]["restored from the commit before"] > count // 10


def test_300_damaged_stores_are_refused_or_restored(stored: Path) -> None:
    check(read_damaged(stored, 1, 0, 300, timeout=100), 300)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_10000_damaged_stores_are_refused_or_restored(stored: Path) -> None:
    for first in range(0, 10_000, 2_500):
        check(read_damaged(stored, 2, first, first + 2_500, timeout=1_200), 2_500)
