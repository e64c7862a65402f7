"""Which commit a user means, and whether what is stored of it is whole."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from esper_ray.errors import CheckpointNotFound, CorruptError, TooNewError
from esper_ray.storage import manifest, objects, pins
from esper_ray.storage.commit_log import RunLog
from esper_ray.storage.problems import Problem
from esper_ray.storage.verification import verify_commit, verify_objects

LATEST = "latest"

_SELECTOR = re.compile(r"latest|step=[0-9]+|[a-z0-9-]{1,64}")
_STEP = re.compile(r"step=([0-9]{1,18})")
_SHOWN = 8


def split_url(url: str) -> tuple[str, str]:
    """Split `URL@latest`, `URL@step=N` or `URL@name`; without a selector it is the latest."""
    base, separator, selector = url.rpartition("@")
    if not separator or _SELECTOR.fullmatch(selector) is None:
        return url, LATEST
    authority_only = "/" not in base.partition("://")[2] if "://" in base else False
    if authority_only and selector != LATEST and not selector.startswith("step="):
        return url, LATEST  # s3://user@bucket names a user, not a checkpoint
    return base, selector


class RunCheckpoints:
    """Finds, checks and lists the commits of one run; it writes nothing."""

    def __init__(self, log: RunLog) -> None:
        self.log = log
        self._url = log.root.url

    def resolve(self, selector: str) -> int:
        """The commit that "latest", "step=N" or a pin means; CheckpointNotFound names what exists.

        A pin names its commit even where the current history has given that up.
        """
        history = self._history()
        step = _STEP.fullmatch(selector)
        if selector != LATEST and step is None and pins.pin_names(self.log.root):
            return pins.pinned_commit(self.log, selector)
        if not history:
            raise CheckpointNotFound(
                f"no checkpoint is stored at {self._url}", "check the URL, or start a new run"
            )
        if selector == LATEST:
            return history[0]
        return self._find_step(history, selector, int(step[1]) if step else None)

    def load(self, seq: int, verify: bool = True) -> dict[str, Any]:
        """The manifest of a commit, all it names checked by size and sha256 unless told not to."""
        body = self.log.read_commit(seq)
        if verify:
            self._check(body)
        return body

    def newest_valid(self, warn: Callable[[str], None]) -> tuple[int, dict[str, Any]] | None:
        """The newest whole commit of this history, a warning for each damaged one before it.

        None if the history is empty; CorruptError if nothing of it can be used.
        """
        history = self._history()
        for seq in history:
            try:
                return seq, self.load(seq)
            except TooNewError:
                raise  # to go on from an older one would give up what a newer version has done
            except CorruptError as error:
                self.log.sources.report.passed_over[seq] = str(error)
                warn(f"checkpoint {seq} is damaged and is passed over: {error}")
        if history:
            raise CorruptError(
                f"all {len(history)} checkpoints at {self._url} are damaged",
                "run `esper-ray checkpoints verify`; start anew at another URL",
            )
        return None

    def rows(self) -> list[dict[str, Any]]:
        """One row for each commit of the history, newest first, its objects checked."""
        return [self._row(seq) for seq in self._history()]

    def verify(self, seq: int | None = None, *, quick: bool = False) -> list[Problem]:
        """Every problem of every object below the root, or of what one commit needs.

        `quick` looks at presence and sizes of segments and log parts, and hashes manifests only.
        """
        if seq is not None:
            return verify_commit(self.log, seq, quick=quick)
        return verify_objects(self.log, quick=quick)

    def _history(self) -> list[int]:
        commits, epochs = self.log.commit_numbers(), self.log.epoch_numbers()
        try:
            self.log.sources.read_record(objects.FORMAT_FILE, objects.check_format_record)
        except FileNotFoundError as error:
            if not commits and not epochs:
                return []
            raise CorruptError(f"{self._url}/{objects.FORMAT_FILE} is missing") from error
        if commits and not epochs:
            raise CorruptError(f"{self._url} has commits, but no record of a start in epochs/")
        return self.log.lineage()

    def _find_step(self, history: list[int], selector: str, wanted: int | None) -> int:
        steps: list[object] = []
        for seq in history:
            try:
                steps.append(self.log.read_commit(seq).get("step"))
            except CorruptError:
                continue
            if wanted is not None and steps[-1] == wanted:
                return seq
        damaged = len(history) - len(steps)
        shown = ", ".join(f"step={step}" for step in steps[:_SHOWN])
        more = ", ..." if len(steps) > _SHOWN else ""
        found = f"no checkpoint {selector!r} at {self._url}: it has {shown or 'none'}{more}"
        if damaged and wanted is not None:
            raise CorruptError(
                f"{found}; {damaged} more cannot be read, {selector} may be one of them",
                "use one of the steps that can be read",
            )
        raise CheckpointNotFound(
            found, "use @latest, @step=N with one of these, or the @NAME of a pin"
        )

    def _row(self, seq: int) -> dict[str, Any]:
        row: dict[str, Any] = {"seq": seq, "step": None, "epoch": None, "time": None}
        row |= {"segments": 0, "bytes": 0, "status": "ok"}
        try:
            body = self.log.read_commit(seq)
            row |= {key: body.get(key) for key in ("step", "epoch", "time")}
            row["segments"] = len(manifest.segments(body))
            row["bytes"] = sum(ref.size for ref in manifest.references(body))
            self._check(body)
        except CorruptError as error:
            row["status"] = f"damaged: {error}"
        return row

    def _check(self, body: dict[str, Any]) -> None:
        for ref in manifest.references(body):
            self.log.sources.read_object(ref)
