"""A folder of what came before, as one commit of a new store, with a report file by file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from torch import Tensor

from esper_ray.actors.persistence import layer_name
from esper_ray.actors.progress import Progress
from esper_ray.errors import ConfigError, CorruptError, MigrationError, UnsafeInputError
from esper_ray.growth import snapshot, state_versions
from esper_ray.growth.snapshot import Columns
from esper_ray.legacy.archive import MAX_FILE_BYTES
from esper_ray.legacy.loading import PtLoader
from esper_ray.legacy.records import Codes, Record, read_record
from esper_ray.legacy.tables import is_table, read_table
from esper_ray.lifecycle import BLENDED_STATES, ExtendedLifecycle
from esper_ray.seeds import ExtendedStateTensor
from esper_ray.storage import Root, RunLog, SegmentRef, codec
from esper_ray.storage.local_disk import read_regular

KIND: Final = "import"
BLUEPRINTS: Final = "blueprints"
MAX_FILES: Final = 100_000
_SUFFIXES: Final = (".pt", ".safetensors")
_ALL_METRICS: Final = 15
_S = ExtendedLifecycle


@dataclass(frozen=True, slots=True)
class FileReport:
    """What became of one file: "imported", "superseded" by a newer record, or "refused"."""

    file: str
    outcome: str
    layer: str | None = None
    seed: int | None = None
    version: int | None = None
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """For a report and for the commit."""
        return {n: getattr(self, n) for n in self.__slots__ if n != "notes"} | {
            "notes": list(self.notes)
        }


@dataclass(slots=True)
class _Layer:
    table: Columns | None = None
    records: dict[int, tuple[Record, str]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Imported:
    """The commit that was made, the seeds of its layers by state, and every file."""

    url: str
    seq: int
    layers: Mapping[str, Mapping[str, int]]
    files: tuple[FileReport, ...]


def import_folder(
    folder: Path, root: Root, *, loader: PtLoader | None = None, codes: Codes = "phase1"
) -> Imported:
    """Read every file of a folder and commit what they tell at a new root.

    UnsafeInputError, before any is opened, for `.pt` files without a loader, which has to be given
    on purpose; MigrationError if no file can be used, ConfigError if something is stored at the
    root already. A file that is refused changes nothing and is in the report.
    """
    paths = _files(folder)
    pickled = [path.name for path in paths if path.suffix == ".pt"]
    if pickled and loader is None:
        raise UnsafeInputError(
            f"{folder} holds {len(pickled)} .pt files, which are pickles",
            "if you know where they come from, import them with --allow-legacy-pt",
        )
    log = RunLog(root)
    if root.names(""):
        raise ConfigError(f"something is stored at {root.url} already", "import to a new URL")
    layers: dict[str, _Layer] = {}
    reports = [_read(path, loader, layers, codes) for path in paths]
    if not layers:
        first = next((f"{r.file}: {r.notes[0]}" for r in reports), "it holds no .pt file")
        raise MigrationError(f"nothing in {folder} can be imported; {first}")
    reports = [_superseded(report, layers) for report in reports]
    return _commit(log, layers, tuple(reports))


def _files(folder: Path) -> list[Path]:
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix in _SUFFIXES)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be read: {error.strerror}", "give a folder") from error
    if len(paths) > MAX_FILES:
        raise ConfigError(f"{folder} has {len(paths)} files, at most {MAX_FILES} are imported")
    return paths


def _read(
    path: Path, loader: PtLoader | None, layers: dict[str, _Layer], codes: Codes
) -> FileReport:
    try:
        data = read_regular(str(path), MAX_FILE_BYTES)
        if path.suffix == ".pt" and loader is not None:
            payload = loader.load(data)
        else:
            payload = codec.decode_tensors(data)
        if is_table(payload):
            name, stored = read_table(payload, path.stem)
            layers.setdefault(name, _Layer()).table = stored.table
            return FileReport(path.name, "imported", name, version=state_versions.PHASE1)
        record = read_record(payload, path.stem, codes)
    except CorruptError as error:
        return FileReport(path.name, "refused", notes=(error.message,))
    except OSError as error:
        return FileReport(path.name, "refused", notes=(f"it cannot be read: {error.strerror}",))
    records = layers.setdefault(record.layer_id, _Layer()).records
    known = records.get(record.seed_id)
    if known is None or known[0].timestamp_s <= record.timestamp_s:
        records[record.seed_id] = (record, path.name)
    return FileReport(
        path.name, "imported", record.layer_id, record.seed_id, record.version, record.notes
    )


def _superseded(report: FileReport, layers: Mapping[str, _Layer]) -> FileReport:
    if report.layer is None or report.seed is None:
        return report
    newest = layers[report.layer].records[report.seed][1]
    if newest == report.file:
        return report
    return FileReport(
        report.file, "superseded", report.layer, report.seed, report.version, (f"by {newest}",)
    )


def _commit(log: RunLog, layers: Mapping[str, _Layer], files: tuple[FileReport, ...]) -> Imported:
    seq = log.open_epoch(None).next_seq
    refs: list[SegmentRef] = []
    progress = Progress()
    for name, layer in sorted(layers.items()):
        state = _state(layer)
        refs += _put(log, name, state, {n: r.tensors for n, (r, _) in layer.records.items()})
        counts = np.bincount(state.host("columns")[state.LIFECYCLE_STATE], minlength=len(_S))
        progress.seeds[name] = {s.name: int(counts[s]) for s in _S if counts[s]}
    body = {
        "run": KIND,
        "step": 0,
        "epoch": 0,
        "samples": 0,
        "config": {},
        "config_digest": hashlib.sha256(b"{}").hexdigest(),
        "coordinator": progress.to_json(),
        "imported": [report.to_json() for report in files],
    }
    log.commit(seq, body, refs)
    return Imported(f"{log.root.url}@step=0", seq, progress.seeds, files)


def _state(layer: _Layer) -> ExtendedStateTensor:
    """Rows of the table, born rows beyond it, and over both what the records say."""
    known = 0 if layer.table is None else len(layer.table["seed_id"])
    state = ExtendedStateTensor(max([known, *(seed + 1 for seed in layer.records)]))
    columns = snapshot.state_columns(state)
    for name, values in (layer.table or {}).items():
        columns[name][:known] = values
    for seed, (record, _) in layer.records.items():
        _set_row(columns, seed, record)
    snapshot.load_state_columns(state, columns, snapshot.entered_grafting(columns))
    return state


def _set_row(columns: Columns, seed: int, record: Record) -> None:
    for name, value in record.columns.items():
        columns[name][seed] = value
    code = record.columns["lifecycle_state"]
    told = record.alpha or 0.0
    columns["alpha"][seed] = told if code == _S.GRAFTING else float(_S(code) in BLENDED_STATES)
    if record.metrics is not None:
        columns["performance_metrics"][seed] = record.metrics
        columns["metrics_valid"][seed] = _ALL_METRICS


def _put(
    log: RunLog,
    name: str,
    state: ExtendedStateTensor,
    blueprints: Mapping[int, Mapping[str, Tensor]],
) -> Iterator[SegmentRef]:
    for part, columns in (
        ("state", snapshot.state_columns(state)),
        ("grafting", snapshot.grafting_columns(state)),
    ):
        rows = len(columns["seed_id"])
        yield log.put_segment(layer_name(name, part), codec.encode_table(columns), "arrow", rows)
    tensors = {f"{seed}/{n}": t for seed, own in blueprints.items() for n, t in own.items()}
    held = sum(1 for own in blueprints.values() if own)
    data = codec.encode_tensors(tensors)
    yield log.put_segment(layer_name(name, BLUEPRINTS), data, "safetensors", held)
