"""Writers of a layer's log killed at random moments: what was acknowledged is there, and whole."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from esper_ray.storage import CheckpointManager, manifest
from esper_ray.storage.objects import read_object
from tests.storage.layer_cases import LAYER

ROOT = Path(__file__).parents[2]


def killed_writer(root: Path, seconds: float) -> list[str]:
    """What a writer has acknowledged before SIGKILL, which came `seconds` after its first word."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.storage.layer_writer_child", str(root)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        first = process.stdout.readline()
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read()
    finally:
        process.kill()
        process.wait(timeout=20)
        process.stdout.close()
    return [line for line in (first + rest).splitlines(keepends=True) if line.endswith("\n")]


def check(root: Path, acknowledged: list[str]) -> None:
    manager = CheckpointManager(str(root), layer_id=LAYER)
    steps = [0]
    for line in acknowledged:
        name, value = line.split()
        if name == "layer":
            steps.append(int(value))
        else:
            found = manager.restore_checkpoint(name, "cpu")
            assert found["state_data"]["lifecycle"] == int(value)
            assert found["blueprint_state"] is not None
    if len(steps) > 1:
        [head] = manager.reader.cut()
        assert head.step is not None
        assert head.step >= max(steps)
        manager.restore_layer()
        manager.restore_layer(step=max(steps))


@pytest.mark.parametrize(
    "kills", [4, pytest.param(200, marks=[pytest.mark.soak, pytest.mark.timeout(1_800)])]
)
def test_a_killed_writer_loses_nothing_that_it_acknowledged(tmp_path: Path, kills: int) -> None:
    draw, told = random.Random(kills), list[str]()
    for _ in range(kills):
        told += killed_writer(tmp_path, draw.uniform(0.0, 0.3))
        check(tmp_path, told[-400:])
    check(tmp_path, told)
    assert len(told) > 5 * kills
    manager = CheckpointManager(str(tmp_path), layer_id=LAYER)
    for seq in manager.reader.seqs(1, 0):
        entry, _ = manager.reader.manifest(1, 0, seq)
        for segment in entry.segments:
            read_object(manager.reader.source.roots[0], segment.ref)
    for path in (tmp_path / "layers").rglob("*.json"):
        manifest.decode(path.read_bytes())
