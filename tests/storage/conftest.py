"""A root on each backend, and a small stored run to damage."""

from __future__ import annotations

import uuid
from pathlib import Path

import numpy as np
import pytest
import torch

from esper_ray.storage.codec import encode_table, encode_tensors
from esper_ray.storage.commit_log import RunLog
from esper_ray.storage.filesystem import Root


@pytest.fixture(params=["file", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Root:
    if request.param == "file":
        return Root.open(str(tmp_path / "deep" / "run"))
    return Root.open(f"memory://{uuid.uuid4().hex}/run")


@pytest.fixture
def local_log(tmp_path: Path) -> RunLog:
    """Two commits of a fresh start, sharing one segment, each with its part of the event log."""
    log = RunLog(Root.open(str(tmp_path / "run")))
    log.open_epoch(None)
    store(log, seq=1, step=10)
    store(log, seq=2, step=20)
    return log


def store(log: RunLog, seq: int, step: int) -> None:
    shared = log.put_segment("stage0/host", encode_tensors({"w": torch.ones(4)}), "safetensors")
    table = encode_table({"step": np.full(3, step, np.int32)})
    state = log.put_segment("layer/first.hidden/state", table, "arrow", rows=3)
    part = log.put_log(seq, f"events to step {step}".encode(), rows=2)
    log.commit(seq, {"step": step, "epoch": seq}, [shared, state], part)


@pytest.fixture
def local_folder(local_log: RunLog) -> Path:
    return Path(local_log.root.url.removeprefix("file://"))
