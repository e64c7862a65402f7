"""A disk that is full, behind the real storage code: a run ends, or goes on and stores it later."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from esper_ray.events import EpochReport
from esper_ray.runtime import Runtime
from esper_ray.storage import Root, RunCheckpoints, RunLog
from tests.cli.conftest import COMMITS, STEPS, Command


class Disk:
    """Files below a folder share `free` bytes; a write beyond them is short, then fails."""

    def __init__(self, folder: Path, free: int) -> None:
        self._folder, self.free, self._write = f"{folder}{os.sep}", free, os.write
        self.full = 0

    def write(self, fd: int, data: bytes | memoryview) -> int:
        if not os.readlink(f"/proc/self/fd/{fd}").startswith(self._folder):
            return self._write(fd, data)
        if not self.free:
            self.full += 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = self._write(fd, memoryview(data)[: self.free])
        self.free -= written
        return written


@pytest.fixture
def disk(here: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Disk]:
    def make(free: int) -> Disk:
        made = Disk(here / "store", free)
        monkeypatch.setattr(os, "write", made.write)
        return made

    return make


@pytest.fixture
def one_commit(finished_run: Path) -> int:
    """Bytes that the finished run stored per commit, about."""
    files = (path for path in (finished_run / "store").rglob("*") if path.is_file())
    return sum(path.stat().st_size for path in files) // COMMITS


def test_full_disk_ends_a_run_that_must_not_warn(
    cli: Command, here: Path, disk: Callable[[int], Disk], one_commit: int
) -> None:
    full = disk(one_commit * 3 // 2)
    error, hint = cli("train", "run.yaml", "--local").failed(2)
    assert full.full
    assert "file:///" in error
    assert "space" in hint
    assert len(list((here / "store" / "commits").iterdir())) == 1
    assert RunCheckpoints(RunLog(Root.open(str(here / "store")))).resolve("latest") == 1


def test_full_disk_stops_even_a_warned_run_at_its_last_commit(
    cli: Command, disk: Callable[[int], Disk], one_commit: int
) -> None:
    disk(one_commit * 3 // 2)
    done = cli("train", "run.yaml", "--local", "--set", "storage.on_upload_error=warn")
    assert done.code == 2
    assert done.stderr.count("a checkpoint is not stored yet: ") >= 1
    assert f"epoch    {STEPS // 2 - 1}/" in done.stderr


def test_warned_run_goes_on_and_stores_everything_when_there_is_space(
    here: Path, disk: Callable[[int], Disk], one_commit: int
) -> None:
    from esper_ray.config import load_config

    full = disk(one_commit * 3 // 2)
    said: list[str] = []

    def on_epoch(report: EpochReport) -> None:
        if report.epoch == STEPS // 2 - 2:
            assert full.full
            full.free = 1 << 30  # somebody has made space

    config = load_config("run.yaml", ["storage.on_upload_error=warn"])
    with Runtime(config, local=True, warn=said.append) as runtime:
        result = runtime.fit("never", on_epoch=on_epoch)
    assert any("a checkpoint is not stored yet: " in line for line in said)
    assert result.steps == STEPS
    log = RunLog(Root.open(str(here / "store")))
    assert log.read_commit(log.lineage()[0])["step"] == STEPS
