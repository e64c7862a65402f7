"""A run with a second root: it gets every commit, and gives back what the first has lost."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from esper_ray.errors import CorruptError, FencedError, StorageUnavailable
from esper_ray.events.messages import EpochReport
from esper_ray.runtime import Runtime
from esper_ray.storage import Retention, Root, RunCheckpoints, RunLog, copy_run, prune, repair
from tests.hostile.stored_run import body_of, make_run, read_objects, resume, run_config, sealed
from tests.servers.fixtures import Place


@pytest.fixture(scope="module")
def mirrored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A signed run at `run`, and its replica at `replica`."""
    folder = tmp_path_factory.mktemp("mirrored")
    (folder / "key").write_bytes(b"0123456789abcdef")
    make_run(folder / "run", **access(folder))
    return folder


@pytest.fixture
def place(mirrored: Path, tmp_path: Path) -> Path:
    shutil.copytree(mirrored, tmp_path, dirs_exist_ok=True)
    return tmp_path


def access(folder: Path, **more: Any) -> dict[str, Any]:
    replicas = [str(folder / "replica")]
    return {"replicas": replicas, "signing_key_file": str(folder / "key"), **more}


def started(folder: Path) -> Runtime:
    runtime = Runtime(run_config(folder / "run", **access(folder)), local=True)
    runtime.open("auto")
    return runtime


def test_replica_is_the_run(place: Path) -> None:
    assert read_objects(place / "replica") == read_objects(place / "run")
    assert RunCheckpoints(RunLog(Root.open(str(place / "replica")))).verify() == []


@pytest.mark.parametrize("folder", ["", "commits", "epochs", "segments", "log"])
@pytest.mark.parametrize("how", ["changed", "missing"])
def test_a_run_resumes_from_what_its_replica_has_whole(place: Path, folder: str, how: str) -> None:
    whole = resume(place / "run", **access(place))
    lost = [p for p in sorted((place / "run" / folder).rglob("*.*")) if p.is_file()]
    if how == "missing" and folder in ("commits", "epochs", ""):
        lost = lost[:1]  # the newest is known by its being there
    for path in lost:
        path.write_bytes(path.read_bytes()[:-1] + b"?")
        if how == "missing":
            path.unlink()
    seq, told, digest = resume(place / "run", **access(place))
    assert (seq, digest) == (whole[0], whole[2])
    if (folder, how) != ("commits", "missing"):  # nothing reads what the first one said
        assert any("is missing or damaged and was read from file://" in line for line in told)


def test_what_the_replica_has_not_whole_falls_back_to_the_commit_before(place: Path) -> None:
    key = RunLog(Root.open(str(place / "run"))).read_commit(4)["segments"][0]["file"]
    for copy in ("run", "replica"):
        (place / copy / "segments" / key).write_bytes(b"damaged")
    seq, told, _ = resume(place / "run", **access(place))
    assert seq == 3
    assert "checkpoint 4 is damaged and is passed over" in told[0]


def forged(data: bytes) -> bytes:
    return sealed({**body_of(data), "step": 0})


@pytest.mark.parametrize("change", [forged, lambda _: b"", lambda data: data + b" " * 2**25])
def test_what_a_replica_forges_is_refused(place: Path, change: Callable[[bytes], bytes]) -> None:
    name = "commits/00000000000000000004.json"
    (place / "run" / name).write_bytes(b"{}")
    path = place / "replica" / name
    path.write_bytes(change(path.read_bytes()))
    seq, told, _ = resume(place / "run", **access(place))
    assert seq == 3
    assert "checkpoint 4 is damaged" in told[0]


def test_a_replica_of_another_run_gives_nothing_and_takes_nothing(place: Path) -> None:
    shutil.rmtree(place / "replica")
    make_run(place / "replica", signing_key_file=str(place / "key"))
    (place / "run" / "commits" / "00000000000000000004.json").write_bytes(b"{}")
    before = read_objects(place / "replica")
    with pytest.raises(FencedError, match="belongs to another run"):
        resume(place / "run", **access(place))
    assert read_objects(place / "replica") == before
    log = RunLog(Root.open(str(place / "run")), replicas=[Root.open(str(place / "replica"))])
    assert RunCheckpoints(log).newest_valid(lambda _: None)[0] == 3  # type: ignore[index]


def test_lost_commits_are_not_written_over(place: Path) -> None:
    (place / "run" / "commits" / "00000000000000000004.json").unlink()
    with pytest.raises(CorruptError, match="ends with checkpoint 3") as caught:
        resume(place / "run", **access(place))
    assert "checkpoints repair file://" in caught.value.hint
    healed = repair(Root.open(str(place / "run")), [Root.open(str(place / "replica"))])
    assert list(healed.healed) == ["commits/00000000000000000004.json"]
    assert resume(place / "run", **access(place))[0] == 4
    shutil.rmtree(place / "run")
    with pytest.raises(CorruptError, match="holds no checkpoint") as caught:
        resume(place / "run", **access(place))
    assert "checkpoints copy file://" in caught.value.hint


def test_a_replica_that_comes_late_gets_all_that_is_whole(place: Path) -> None:
    shutil.rmtree(place / "replica")
    root = Root.open(str(place / "run"))
    for _ in range(2):
        prune(root, Retention(last=3), 0, alone=True)
    (place / "run" / "commits" / "00000000000000000003.json").write_bytes(b"{}")
    started(place).close()
    there = RunLog(Root.open(str(place / "replica")))
    assert there.commit_numbers() == [2, 4]
    assert RunCheckpoints(there).verify() == []


def test_a_replica_that_is_away_is_told_and_caught_up_with(tmp_path: Path) -> None:
    (tmp_path / "replica").write_bytes(b"no folder")
    replicas: dict[str, Any] = {"replicas": [str(tmp_path / "replica")]}
    config = run_config(tmp_path / "run", 8, **replicas)
    with pytest.raises(StorageUnavailable), Runtime(config, local=True) as runtime:
        runtime.fit()

    def end_fault(report: EpochReport) -> None:
        if report.epoch == 4:  # the first commit was made at the end of epoch 3
            (tmp_path / "replica").unlink()

    told: list[str] = []
    config = run_config(tmp_path / "run", 8, **replicas, on_upload_error="warn")
    with Runtime(config, local=True, warn=told.append) as runtime:
        runtime.fit(on_epoch=end_fault)
    assert "a checkpoint is not stored yet: replica file://" in told[0]
    assert read_objects(tmp_path / "replica") == read_objects(tmp_path / "run")


def test_a_run_on_a_disk_has_a_replica_on_an_object_store(tmp_path: Path, weed: Place) -> None:
    far = weed.root()
    given: dict[str, Any] = {"replicas": [far.url], "replica_options": weed.options}
    with Runtime(run_config(tmp_path / "run", 2, **given), local=True) as runtime:
        runtime.fit()
    whole = read_objects(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "segments")
    seq, told, _ = resume(tmp_path / "run", **given)
    assert seq == 1
    assert far.url in told[0]
    shutil.rmtree(tmp_path / "run")
    copy_run(far, Root.open(str(tmp_path / "run")))
    copied = read_objects(tmp_path / "run")
    assert {path: copied[path] for path in whole} == whole
    assert RunCheckpoints(RunLog(far)).verify() == []
