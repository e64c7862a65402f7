"""A process that saves checkpoints for ever and says which of them it was told are durable."""

from __future__ import annotations

import sys
import threading
from queue import SimpleQueue

from esper_ray.storage import CheckpointId, CheckpointManager, ShardId
from esper_ray.storage.group_commit import CommitPolicy
from tests.storage.layer_cases import LAYER, SCHEMA, blueprint, rows_of

SEEDS = 64


def main(root: str) -> None:
    """Print `id lifecycle` of every seed checkpoint, and `layer step`, once it is durable."""
    saved: SimpleQueue[tuple[str, CheckpointId | None, object]] = SimpleQueue()
    manager = CheckpointManager(
        root,
        layer_id=LAYER,
        schema=SCHEMA,
        shard=ShardId.whole(SEEDS),
        policy=CommitPolicy(interval_s=0.002),
    )
    threading.Thread(target=acknowledge, args=(saved,), daemon=True).start()
    number = 1 + max((step for step in steps(root)), default=0)
    while True:
        everyone = manager.needs_all or number % 7 == 0
        rows = rows_of(range(SEEDS) if everyone else [number % SEEDS], seed=number)
        saved.put((f"layer {number}", None, manager.save_layer(rows, step=number)))
        for seed in range(5):
            state, weights = {"lifecycle": number % 11}, blueprint(float(number % 100))
            one = manager.save_checkpoint(LAYER, (number + seed) % SEEDS, state, weights)
            saved.put((f"{one} {number % 11}", one, one.future))
        number += 1


def steps(root: str) -> list[int]:
    """The newest step that is stored, if there is one."""
    reader = CheckpointManager(root, layer_id=LAYER).reader
    head = reader.newest(1, 0)
    return [head.step] if head is not None and head.step is not None else []


def acknowledge(saved: SimpleQueue[tuple[str, CheckpointId | None, object]]) -> None:
    """Wait for each save in turn and tell of it."""
    while True:
        text, _, future = saved.get()
        future.wait(timeout=30)  # type: ignore[attr-defined]
        print(text, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
