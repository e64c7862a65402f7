"""What a run looks like on a terminal, and as plain lines."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table

from esper_ray.actors.run_point import RunPoint, RunResult
from esper_ray.config import RunConfig
from esper_ray.data import DatasetCard
from esper_ray.events.messages import EpochReport
from esper_ray.lifecycle import MINIMUM_EPOCHS, ExtendedLifecycle, GateSettings
from esper_ray.planning import RunPlan
from esper_ray.runtime import LN2


def epoch_line(report: EpochReport, epochs: int, metric: str) -> str:
    """One epoch: losses of train and gate split, seeds by state over all layers."""
    totals: dict[str, int] = {}
    for counts in report.seeds.values():
        for state, count in counts.items():
            totals[state] = totals.get(state, 0) + count
    seeds = " ".join(f"{state}:{count}" for state, count in totals.items())
    loss = sum(report.losses) / max(len(report.losses), 1)
    score = (
        f"{report.gate_loss / LN2:6.3f} bits/byte"
        if metric == "bits_per_byte"
        else f"{report.gate_accuracy:6.1%} correct"
    )
    saved = "" if report.commit is None else f"  saved #{report.commit}"
    return f"epoch {report.epoch + 1:>4}/{epochs}  loss {loss:.4f}  {score}  {seeds}{saved}"


class Progress:
    """One line per epoch on stderr; on a terminal the last line is live."""

    def __init__(self, epochs: int, card: DatasetCard) -> None:
        self._epochs, self._card = epochs, card
        self._console = Console(stderr=True, highlight=False, markup=False)
        self._live = Live(console=self._console, auto_refresh=False, transient=True)

    def __enter__(self) -> Self:
        """Name the data, then start."""
        sizes = ", ".join(f"{name} {size:,}" for name, size in self._card.splits.items())
        self._line(f"data {self._card.name}: {sizes} bytes, sha256 {self._card.sha256[:16]}")
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the terminal as it was."""
        self._live.stop()

    def show(self, report: EpochReport) -> None:
        """Print the epoch and, on a terminal, the seeds of each layer below it."""
        self._line(epoch_line(report, self._epochs, self._card.metric))
        if self._console.is_terminal:
            self._live.update(_seed_table(report.seeds), refresh=True)

    def _line(self, text: str) -> None:
        if self._console.is_terminal:
            self._console.print(text, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)


def _seed_table(seeds: Mapping[str, Mapping[str, int]]) -> Table:
    table = Table(box=None)
    table.add_column("layer")
    table.add_column("seeds")
    for layer, counts in seeds.items():
        table.add_row(layer, ", ".join(f"{n} {state}" for state, n in counts.items()))
    return table


def summary(config: RunConfig, command: str, result: RunResult) -> str:
    """The end of a run: scores, seeds, changed thresholds, where it is stored, how to go on.

    `command` is the command line that made the run.
    """
    scores = ", ".join(f"{name} {value:.4g}" for name, value in result.eval.items())
    how = "" if result.status == "completed" else f", {result.status}"
    lines = [f"{result.run}: {result.steps} steps in {result.wall_s:.0f} s{how}"]
    lines += [f"test: {scores}"] if scores else []
    for layer, counts in result.seeds.items():
        lines.append(f"{layer}: " + ", ".join(f"{n} {state}" for state, n in counts.items()))
    lines.append(f"{result.transitions} transitions through {', '.join(result.states_visited)}")
    minima = config.lifecycle.minimum_epochs.items()
    changed = GateSettings.of(config.lifecycle.gates).changed()
    changed |= {name: n for name, n in minima if n != MINIMUM_EPOCHS[ExtendedLifecycle[name]]}
    if changed:
        lines.append("not at default: " + ", ".join(f"{k} {v}" for k, v in changed.items()))
    lines.append(f"checkpoint: {result.checkpoint}")
    lines.append(f"restore: {command} --resume {shlex.quote(result.checkpoint)}")
    return "\n".join(lines)


def plan_document(config: RunConfig, plan: RunPlan) -> dict[str, Any]:
    """What `plan` prints, as plain values."""
    return {
        "run": config.run,
        "data": {
            "name": plan.card.name,
            "source": plan.card.source,
            "bytes": plan.card.bytes,
            "splits": dict(plan.card.splits),
            "sha256": plan.card.sha256,
        },
        "storage": config.storage_url,
        "address": config.cluster.address,
        "transport": plan.transport,
        "split": config.cluster.shards > 1 or config.cluster.gpus > len(plan.stages),
        "actors": [_actor(plan, rank) for rank in range(plan.grid.world)],
        "layers": [
            {name: getattr(layer, name) for name in layer.__slots__} for layer in plan.layers
        ],
    }


def _actor(plan: RunPlan, rank: int) -> dict[str, Any]:
    index, shard = plan.grid.place(rank)
    stage = plan.stages[index]
    return {
        "actor": "LayerActor",
        "rank": rank,
        "stage": stage.name,
        "shard": shard.index,
        "shards": shard.count,
        "device": stage.device,
        "cpus": 1,
        "gpus": int(stage.device == "cuda"),
    }


_LAYER_COLUMNS = {
    "layer_id": "layer",
    "stage": "stage",
    "kind": "type",
    "width": "width",
    "seeds": "seeds",
    "chunk": "chunk",
    "host_parameters": "host params",
    "seed_parameters": "seed params",
    "bytes": "bytes",
}


def plan_table(document: Mapping[str, Any]) -> str:
    """The plan as text."""
    data, actors = document["data"], document["actors"]
    sizes = ", ".join(f"{name} {size:,}" for name, size in data["splits"].items())
    lines = [
        f"run {document['run']}, stored at {document['storage']}",
        f"data {data['name']} ({data['source']}): {sizes} bytes, sha256 {data['sha256']}",
        f"{len(actors)} LayerActors ({_stages(actors)}), {_each(actors[0])} each, on a "
        f"{document['address']} cluster, transport {document['transport']}",
        *_not_split(document),
        text_table(
            list(_LAYER_COLUMNS.values()),
            [
                [
                    f"{layer[key]:,}" if isinstance(layer[key], int) else layer[key]
                    for key in _LAYER_COLUMNS
                ]
                for layer in document["layers"]
            ],
        ),
    ]
    return "\n".join(lines)


def _stages(actors: Sequence[Mapping[str, Any]]) -> str:
    firsts = [actor for actor in actors if actor["shard"] == 0]
    return ", ".join(
        f"{a['stage']} in {a['shards']} shards" if a["shards"] > 1 else a["stage"] for a in firsts
    )


def _each(actor: Mapping[str, Any]) -> str:
    return "1 CPU and 1 GPU" if actor["gpus"] else "1 CPU"


def _not_split(document: Mapping[str, Any]) -> list[str]:
    """Why layers are whole where shards were asked for."""
    if not document["split"]:
        return []
    return [
        f"layer {layer['layer_id']} is not split: {layer['whole']}"
        for layer in document["layers"]
        if layer["whole"]
    ]


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned columns, two spaces apart."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    )


def checkpoint_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line per run commit."""
    if not rows:
        return "no checkpoints"
    header = list(rows[0])
    return text_table(header, [[str(row[key]) for key in header] for row in rows])


def checkpoint_text(body: Mapping[str, Any]) -> str:
    """One run commit in words."""
    point = RunPoint.from_json(body)
    lines = [
        f"run {point.run}, step {point.step}, epoch {point.epoch}, written {point.time}",
        f"config sha256 {point.config_digest}",
    ]
    for layer, counts in point.progress.seeds.items():
        lines.append(f"{layer}: " + ", ".join(f"{n} {state}" for state, n in counts.items()))
    outcomes = point.progress.outcomes
    lines += outcomes.text().splitlines() if outcomes.by_name else []
    header = ["segment", "bytes", "rows", "sha256"]
    segments = [
        [s["name"], f"{s['size']:,}", str(s["rows"]), s["sha256"][:16]] for s in body["segments"]
    ]
    return "\n".join([*lines, text_table(header, segments)])
