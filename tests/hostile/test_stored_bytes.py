"""Any object of a stored run or layer, damaged by accident or intent: refused, restored, never
taken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.hostile import forgeries
from tests.hostile.child import Job
from tests.hostile.stored_layer import make_layer
from tests.hostile.stored_run import make_run
from tests.pages import ROOT

MEMORY_BOUND = 128 * 2**20
"""Bytes by which a process may grow over all the damaged stores that it reads."""


@pytest.fixture(scope="session")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stored run in `run`, a signed one in `signed`, a layer in `layer`, and hostile tables."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "key").write_bytes(b"0123456789abcdef")
    make_run(folder / "run")
    make_run(folder / "signed", signing_key_file=str(folder / "key"))
    make_layer(folder / "layer")
    for kind, state in (("run", forgeries.STATE), ("layer", forgeries.LAYER_STATE)):
        (folder / f"{kind} tables").mkdir()
        for name, data in forgeries.arrow_files(state).items():
            (folder / f"{kind} tables" / f"{name}.bin").write_bytes(data)
    return folder


def job(stored: Path, what: str, seed: int, first: int, last: int) -> Job:
    """Damaged stores of these numbers, of a `run`, a `signed` run or a `layer`."""
    kind = "layer" if what == "layer" else "run"
    key = {"signing_key_file": str(stored / "key")} if what == "signed" else {}
    places = (str(stored / what), str(stored / f"{kind} tables"))
    return Job(kind, *places, seed, first, last, key)


def read_damaged(jobs: Sequence[Job], timeout: int) -> list[dict[str, int]]:
    """How many damaged stores of each job had which outcome, read in a process of their own.

    Every store has one, of every kind there are some, and the process does not grow.
    """
    done = subprocess.run(
        [sys.executable, "-m", "tests.hostile.child", json.dumps([asdict(job) for job in jobs])],
        cwd=ROOT,
        # Each thread's own arena would take 64 MiB of the address space that is left.
        env={**os.environ, "MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"{lines[-1:]}: {done.returncode}: {done.stderr[-3000:]}"
    told: list[dict[str, Any]] = [found for found in map(json.loads, lines) if "grown" in found]
    for one, found in zip(jobs, told, strict=True):
        outcomes, count = found["outcomes"], one.last - one.first
        assert sum(outcomes.values()) == count
        assert found["grown"] < MEMORY_BOUND
        assert any(name.startswith("refused") for name in outcomes)
        assert outcomes["restored from what was before"] > count // 5
    return [found["outcomes"] for found in told]


def test_300_damaged_stores_are_refused_or_restored(stored: Path) -> None:
    jobs = [job(stored, "run", 1, 0, 150), job(stored, "layer", 1, 150, 270)]
    _, _, signed = read_damaged([*jobs, job(stored, "signed", 1, 270, 300)], timeout=100)
    # A signature refuses what only its writer could know better.
    assert not [name for name in signed if name.startswith("legal")]


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("what", "first", "last"),
    [
        ("run", 0, 2_000),
        ("run", 2_000, 4_000),
        ("signed", 4_000, 6_000),
        ("layer", 6_000, 8_000),
        ("layer", 8_000, 10_000),
    ],
)
def test_10000_damaged_stores_are_refused_or_restored(
    stored: Path, what: str, first: int, last: int
) -> None:
    read_damaged([job(stored, what, 2, first, last)], 1_200)
