"""The run log: starts of a run, and commits that are created after all that they name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from esper_ray.errors import (
    CheckpointNotFound,
    CorruptError,
    FencedError,
    StorageUnavailable,
    TooNewError,
)
from esper_ray.storage import capability, gc_log, manifest, objects
from esper_ray.storage.filesystem import Root
from esper_ray.storage.manifest import LogRef, SegmentRef
from esper_ray.storage.objects import commit_path, epoch_path
from esper_ray.storage.replica import Replica
from esper_ray.storage.signing import SigningKey, checked, sign
from esper_ray.storage.sources import Sources

_EPOCH_ATTEMPTS = 64
_NO_SEQ = 10**20  # above every number that a commit's name can hold
_RESERVED = frozenset(
    {"format", "min_reader", "kind", "seq", "time", "run_epoch", "writer", "segments", "log"}
    | {"signature"}
)


@dataclass(frozen=True, slots=True)
class EpochRecord:
    """One start of a run: what it continues, and the first commit number that is its own."""

    run_epoch: int
    resumed_from: int | None
    next_seq: int
    source: str | None = None

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> EpochRecord:
        """Read a record that nobody vouches for; CorruptError unless every field is right."""
        record = cls(*(body.get(name) for name in cls.__slots__))  # type: ignore[arg-type]
        right = (
            body.get("kind") == "epoch"
            and type(record.run_epoch) is int
            and type(record.next_seq) is int
            and type(record.resumed_from) in (int, type(None))
            and type(record.source) in (str, type(None))
        )
        if not right or (record.resumed_from or 0) >= record.next_seq:
            raise CorruptError("it is no record of a run's start")
        return record


def chain(epochs: Sequence[EpochRecord]) -> Iterator[tuple[EpochRecord, int | None]]:
    """Starts of the current history, newest first, each with the last commit that counts of it."""
    last: int | None = None
    for epoch in sorted(epochs, key=lambda epoch: epoch.run_epoch, reverse=True):
        if last is not None and epoch.next_seq > last:
            continue  # it began after the commit that was resumed: its commits were given up
        yield epoch, last
        if epoch.resumed_from is None:
            return
        last = epoch.resumed_from


def lineage(epochs: Sequence[EpochRecord], seqs: Iterable[int]) -> list[int]:
    """Commit numbers of the current history, newest first."""
    stored = sorted(set(seqs), reverse=True)
    return [
        seq
        for epoch, last in chain(epochs)
        for seq in stored
        if seq >= epoch.next_seq and (last is None or seq <= last)
    ]


def leading_to(upto: int | None, epochs: Sequence[EpochRecord]) -> Sequence[EpochRecord]:
    """The starts, with one more that resumes commit `upto`: its history is what led there."""
    if upto is None:
        return epochs
    number = max((epoch.run_epoch for epoch in epochs), default=0) + 1
    return [*epochs, EpochRecord(number, upto, _NO_SEQ)]


class RunLog:
    """Writes and reads the log of one run.

    `open_epoch` makes this process its writer; a process that is handed the record of an epoch
    opened on its behalf passes it as `epoch`. With a key, commits and epoch records are signed, and
    others are a SignatureError. What the root lacks or holds damaged is read from `replicas`, which
    are never written.
    """

    def __init__(
        self,
        root: Root,
        epoch: EpochRecord | None = None,
        key: SigningKey | None = None,
        replicas: Sequence[Replica] = (),
    ) -> None:
        self.root = root
        self.sources = Sources([root], replicas)
        self._epoch, self._key = epoch, key
        self._attempt: tuple[tuple[int, bytes], bytes] | None = None

    def open_epoch(self, resumed_from: int | None, source: str | None = None) -> EpochRecord:
        """Record one start of the run, fresh or resumed from a commit; commits may follow.

        CapabilityError, and nothing stored, where the store has no conditional create.
        """
        capability.check_conditional_create(self.root)
        self._ensure_format()
        for _ in range(_EPOCH_ATTEMPTS):
            seqs = self.commit_numbers()
            if resumed_from is not None and resumed_from not in seqs:
                raise CheckpointNotFound(f"{self.root.url} has no commit {resumed_from}")
            starts = self.epoch_numbers()
            run_epoch = objects.next_number(f"{self.root.url}/epochs", starts, digits=8)
            next_seq = objects.next_number(f"{self.root.url}/commits", seqs)
            record = EpochRecord(run_epoch, resumed_from, next_seq, source)
            body = {
                **objects.header("epoch", run_epoch),
                "resumed_from": resumed_from,
                "next_seq": record.next_seq,
                "source": source,
            }
            try:
                data = manifest.encode(sign(body, self._key))
                objects.create_or_confirm(self.root, epoch_path(run_epoch), data)
            except FencedError:
                continue  # another start took this number
            self._epoch, self._attempt = record, None
            if resumed_from is not None:
                self._check_kept(resumed_from)
            return record
        raise StorageUnavailable(
            f"{self.root.url} is being started by too many writers", "give each run its own URL"
        )

    def put_segment(self, name: str, data: bytes, suffix: str, rows: int = 0) -> SegmentRef:
        """Store bytes under their sha256, once; `suffix` is "arrow" or "safetensors"."""
        return objects.put_segment(self.root, name, data, suffix, rows)

    def put_log(self, seq: int, data: bytes, rows: int) -> LogRef:
        """Store the events that commit `seq` will name; FencedError if another writer did so.

        After StorageUnavailable the same call may be made again.
        """
        return objects.put_log(self.root, self._writer_epoch(seq).run_epoch, seq, data, rows)

    def commit(
        self,
        seq: int,
        body: Mapping[str, Any],
        segments: Sequence[SegmentRef],
        log: LogRef | None = None,
    ) -> None:
        """Create commit `seq` of what is stored already; FencedError if the number is taken.

        After StorageUnavailable the same call may be made again: it repeats the same bytes.
        """
        epoch = self._writer_epoch(seq)
        if clash := sorted(_RESERVED & body.keys()):
            raise ValueError(f"the log itself writes {clash} into a commit")
        if len({ref.name for ref in segments}) != len(segments):
            raise ValueError("a commit names a segment twice")
        content = {**body, "seq": seq, "segments": [ref.to_json() for ref in segments]}
        if log is not None:
            if log.file != manifest.log_file(epoch.run_epoch, seq):
                raise ValueError(f"{log.file} is not the event log of commit {seq}")
            content["log"] = log.to_json()
        asked = (seq, manifest.encode(content))
        if self._attempt is None or self._attempt[0] != asked:
            header = objects.header("run", epoch.run_epoch)
            signed = sign({**content, **header}, self._key)
            self._attempt = (asked, manifest.encode(signed))
        objects.create_or_confirm(self.root, commit_path(seq), self._attempt[1])

    def lineage(self, upto: int | None = None) -> list[int]:
        """Commit numbers of the current history, or up to one commit, newest first.

        CorruptError if it is unknown; CheckpointNotFound if `upto` is not stored.
        """
        seqs = self.commit_numbers()
        if upto is not None and upto not in seqs:
            raise CheckpointNotFound(f"{self.root.url} has no commit {upto}")
        return lineage(leading_to(upto, self.epochs()), seqs)

    def source(self, upto: int | None = None) -> str | None:
        """URL of the other place that this history continues, None if it begins here."""
        starts = list(chain(leading_to(upto, self.epochs())))
        return starts[-1][0].source if starts else None

    def epochs(self) -> list[EpochRecord]:
        """Every start of this run, oldest first; CorruptError if a record is damaged."""
        numbers = self.epoch_numbers()
        try:
            return [self.read_epoch(number) for number in range(1, max(numbers, default=0) + 1)]
        except FileNotFoundError as error:
            raise CorruptError(
                f"{self.root.url}/epochs has a gap: it ends with {numbers[-8:]}"
            ) from error

    def commit_numbers(self) -> list[int]:
        """Numbers of all stored commits, damaged and superseded ones too, in order."""
        return objects.numbers(self.root, "commits", objects.COMMIT_NAME)

    def epoch_numbers(self) -> list[int]:
        """Numbers of all stored epoch records, in order."""
        return objects.numbers(self.root, "epochs", objects.EPOCH_NAME)

    def read_epoch(self, number: int) -> EpochRecord:
        """One epoch record; CorruptError if it is damaged, FileNotFoundError if absent."""

        def check(body: dict[str, Any], where: str) -> EpochRecord:
            record = EpochRecord.from_json(checked(body, self._key, where))
            if record.run_epoch != number:
                raise CorruptError(f"{where} is the record of another epoch")
            return record

        return self.sources.read_record(epoch_path(number), check)

    def read_commit(self, seq: int) -> dict[str, Any]:
        """The manifest of one commit; CheckpointNotFound if absent, CorruptError if damaged."""

        def check(body: dict[str, Any], where: str) -> dict[str, Any]:
            body = checked(body, self._key, where)
            if body.get("kind") != "run" or body.get("seq") != seq:
                raise CorruptError(f"{where} is not the manifest of commit {seq}")
            try:
                manifest.references(body)
            except CorruptError as error:
                raise CorruptError(f"{where}: {error}") from error
            return body

        try:
            return self.sources.read_record(commit_path(seq), check)
        except FileNotFoundError as error:
            raise CheckpointNotFound(f"{self.root.url} has no commit {seq}") from error

    def read_segment(self, ref: SegmentRef) -> bytes:
        """The bytes of a segment, their size and sha256 checked; CorruptError otherwise."""
        return self.sources.read_object(ref)

    def read_log(self, ref: LogRef) -> bytes:
        """The bytes of a log part, their size and sha256 checked; CorruptError otherwise."""
        return self.sources.read_object(ref)

    def log_parts(self, upto: int | None = None) -> list[tuple[int, LogRef]]:
        """Commits and log parts of the current history, oldest first, or of that of one commit.

        CheckpointNotFound if `upto` is not stored; CorruptError if one of the commits is damaged.
        """
        history, told = self.lineage(upto), gc_log.pruned_parts(self.root)
        told |= {seq: manifest.log_part(self.read_commit(seq)) for seq in history}
        history = lineage(leading_to(upto, self.epochs()), told)
        parts = ((seq, told[seq]) for seq in reversed(history))
        return [(seq, part) for seq, part in parts if part is not None]

    def _ensure_format(self) -> None:
        try:
            objects.ensure_format(self.root)
        except TooNewError:
            raise
        except CorruptError:
            path = objects.FORMAT_FILE
            self.sources.read_record(path, objects.check_format_record)  # or it is as it is
            self.root.replace(path, objects.format_record())

    def _check_kept(self, seq: int) -> None:
        """Wait until no garbage collection is about to delete a commit; it may be gone then."""
        path = commit_path(seq)
        gc_log.await_sweeps(self.root, path, 0)
        if seq not in self.commit_numbers():
            raise CheckpointNotFound(
                f"{self.root.url} has no commit {seq} any more: it was pruned", "use @latest"
            )

    def _writer_epoch(self, seq: int) -> EpochRecord:
        if self._epoch is None:
            raise RuntimeError("open_epoch comes before the first commit")
        if seq < self._epoch.next_seq:
            raise ValueError(
                f"commit {seq} is not this epoch's, {self._epoch.next_seq} is its first"
            )
        try:
            self.root.size(epoch_path(self._epoch.run_epoch + 1))
        except FileNotFoundError:
            return self._epoch
        raise FencedError(
            f"{self.root.url} was started again by another writer",
            "stop one of the two runs, or give each its own URL",
        )
