"""A coordinator whose store fails for a while: it ends, or goes on and stores everything later."""

from __future__ import annotations

from typing import Any

import pytest

from esper_ray.errors import StorageUnavailable
from esper_ray.events.log import EventKind
from esper_ray.lifecycle import ExtendedLifecycle as S
from esper_ray.storage import Root, RunLog
from tests.actors.coordination import build, logged, report, run_epoch
from tests.builders import telemetry


class FailingRoot(Root):
    """A root that stores nothing below one folder, or stores it and says that it did not."""

    folder = ""
    stores = False

    def create(self, path: str, data: bytes) -> None:
        failing = self.folder and path.startswith(self.folder)
        if not failing or self.stores:
            super().create(path, data)
        if failing:
            raise StorageUnavailable("no answer", "wait")

    def size(self, path: str) -> int:
        if self.folder and path.startswith(self.folder):
            raise StorageUnavailable("no answer", "wait")
        return super().size(path)


@pytest.fixture
def failing(request: pytest.FixtureRequest) -> FailingRoot:
    root = FailingRoot.open(f"memory://{request.node.name}/run")
    assert isinstance(root, FailingRoot)
    return root


async def epochs(coordinator: Any, *numbers: int) -> list[tuple[int | None, str]]:
    done = []
    for epoch in numbers:
        told = await run_epoch(coordinator, report(epoch, telemetry([S.DORMANT], epoch=epoch)))
        done.append((told.commit, told.upload_error))
    return done


@pytest.mark.parametrize("folder", ["segments", "log", "commits"])
@pytest.mark.parametrize("stores", [False, True])
async def test_run_that_may_warn_stores_every_event_once_when_the_store_is_back(
    failing: FailingRoot, folder: str, stores: bool
) -> None:
    coordinator, *_ = await build(failing, every_epochs=1, epochs=6, upload_errors_pass=True)
    assert await epochs(coordinator, 0) == [(1, "")]
    failing.folder, failing.stores = folder, stores
    assert await epochs(coordinator, 1, 2) == [(None, "no answer")] * 2
    failing.folder = ""
    assert [commit for commit, _ in await epochs(coordinator, 3, 4, 5)][-1] is not None
    history = RunLog(failing).lineage()
    steps = [RunLog(failing).read_commit(seq)["step"] for seq in history]
    assert steps[:3] == [24, 20, 16]
    assert logged(failing, EventKind.EPOCH).columns["epoch"].tolist() == list(range(6))


async def test_run_that_must_not_warn_fails(failing: FailingRoot) -> None:
    coordinator, *_ = await build(failing, every_epochs=1, epochs=6)
    failing.folder = "commits"
    with pytest.raises(StorageUnavailable, match="no answer"):
        await epochs(coordinator, 0)


async def test_last_commit_must_be_stored(failing: FailingRoot) -> None:
    coordinator, *_ = await build(failing, every_epochs=1, epochs=2, upload_errors_pass=True)
    failing.folder = "log"
    assert await epochs(coordinator, 0) == [(None, "no answer")]
    with pytest.raises(StorageUnavailable, match="no answer"):
        await epochs(coordinator, 1)
