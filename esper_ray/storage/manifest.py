"""Manifests: canonical JSON that names its own digest, and references to what was stored."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn, Self

from esper_ray.errors import CorruptError, TooNewError

FORMAT = "esper-ckpt"
READER_VERSION = 1
MAX_BYTES = 16 * 2**20
LOG_FILE = re.compile(r"[0-9]{8}-[0-9]{20}\.arrow")

_MAX_DEPTH = 64
# Wide enough for the 128-bit words of a numpy generator's state.
_MAX_DIGITS = 64
_MAX_NAME = 1024
_FILE = re.compile(r"sha256/([0-9a-f]{2})/([0-9a-f]{64})\.(?:arrow|safetensors)")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class _Reference:
    """What references to stored objects share: two counts, all else text, and their JSON form."""

    __slots__: tuple[str, ...] = ()
    kind: ClassVar[str]
    size: int
    rows: int

    def to_json(self) -> dict[str, Any]:
        """The reference as JSON values."""
        return {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def from_json(cls, value: object) -> Self:
        """Read a reference that nobody vouches for; CorruptError unless every field is right."""
        if not isinstance(value, dict) or value.keys() != set(cls.__slots__):
            raise CorruptError(f"a manifest holds a malformed {cls.kind} reference")
        if not all(isinstance(value[key], str) for key in value.keys() - {"size", "rows"}):
            raise CorruptError(f"a manifest holds a {cls.kind} reference that is no text")
        try:
            return cls(**value)
        except ValueError as error:
            raise CorruptError(f"a manifest names a refused {cls.kind}: {error}") from error

    def _check_counts(self) -> None:
        for what, number in (("size", self.size), ("rows", self.rows)):
            if type(number) is not int or not 0 <= number < 2**63:
                raise ValueError(f"{what} of {self} is {number!r}")


@dataclass(frozen=True, slots=True)
class SegmentRef(_Reference):
    """One stored segment: its role inside the run and the bytes it must have."""

    kind: ClassVar[str] = "segment"

    name: str
    file: str
    sha256: str
    size: int
    rows: int = 0

    def __post_init__(self) -> None:
        if not 1 <= len(self.name) <= _MAX_NAME:
            raise ValueError(f"a segment name has 1 to {_MAX_NAME} characters")
        match = _FILE.fullmatch(self.file)
        if match is None or match[2] != self.sha256 or not match[2].startswith(match[1]):
            raise ValueError(f"{self.file!r} is not the segment file of sha256 {self.sha256!r}")
        self._check_counts()

    @property
    def path(self) -> str:
        """Where the segment lies below the storage prefix."""
        return f"segments/{self.file}"


@dataclass(frozen=True, slots=True)
class LogRef(_Reference):
    """The part of the event log that one commit adds, and the bytes it must have."""

    kind: ClassVar[str] = "log part"

    file: str
    sha256: str
    size: int
    rows: int

    def __post_init__(self) -> None:
        if not LOG_FILE.fullmatch(self.file) or not _SHA256.fullmatch(self.sha256):
            raise ValueError(f"{self.file!r} of sha256 {self.sha256!r} is no part of an event log")
        self._check_counts()

    @property
    def path(self) -> str:
        """Where the part lies below the storage prefix."""
        return f"log/{self.file}"


def log_file(run_epoch: int, seq: int) -> str:
    """The file of commit `seq`'s part of the event log, below `log/`."""
    return f"{run_epoch:08d}-{seq:020d}.arrow"


def segments(body: dict[str, Any]) -> list[SegmentRef]:
    """The segment references of a decoded manifest, each checked, no name twice."""
    listed = body.get("segments")
    if not isinstance(listed, list):
        raise CorruptError("a manifest has no list of segments")
    refs = [SegmentRef.from_json(value) for value in listed]
    if len({ref.name for ref in refs}) != len(refs):
        raise CorruptError("a manifest names a segment twice")
    return refs


def log_part(body: dict[str, Any]) -> LogRef | None:
    """The part of the event log that a decoded manifest names, None if it names none."""
    if "log" not in body:
        return None
    ref = LogRef.from_json(body["log"])
    run_epoch, seq = body.get("run_epoch"), body.get("seq")
    if type(run_epoch) is not int or type(seq) is not int or ref.file != log_file(run_epoch, seq):
        raise CorruptError(f"a manifest names {ref.file}, the event log of another commit")
    return ref


def references(body: dict[str, Any]) -> list[SegmentRef | LogRef]:
    """Every object that a decoded manifest names, each reference checked."""
    part = log_part(body)
    return [*segments(body), *([part] if part else [])]


def encode(body: dict[str, Any]) -> bytes:
    """Canonical bytes of `body` with its self_sha256; ValueError if no reader would take them."""
    data = _sealed(body)
    try:
        _parse(data)
    except CorruptError as error:
        raise ValueError(f"this body cannot be stored: {error}") from error
    return data


def decode(data: bytes) -> dict[str, Any]:
    """The body of `data` without self_sha256; CorruptError unless these are the bytes written."""
    body = _parse(data)
    if body.pop("self_sha256", None) is None:
        raise CorruptError("it carries no self_sha256")
    try:
        intact = _sealed(body) == data
    except ValueError as error:
        raise CorruptError(f"it is not canonical JSON: {error}") from error
    if not intact:
        raise CorruptError("its bytes are not those of its self_sha256")
    if body.get("format") != FORMAT:
        raise CorruptError(f"its format is {body.get('format')!r}, not {FORMAT!r}")
    needed = body.get("min_reader", READER_VERSION)
    if type(needed) is not int or needed < 1:
        raise CorruptError(f"it needs reader {needed!r}, which never was")
    if needed > READER_VERSION:
        raise TooNewError(
            f"it was written by a newer version: it needs reader {needed!r}, "
            f"this one is {READER_VERSION}",
            "update esper-ray",
        )
    return body


def _sealed(body: dict[str, Any]) -> bytes:
    if "self_sha256" in body:
        raise ValueError("self_sha256 is added by encode")
    digest = hashlib.sha256(canonical(body)).hexdigest()
    return canonical({**body, "self_sha256": digest})


def canonical(body: Mapping[str, Any]) -> bytes:
    """The one JSON text of these values: sorted keys, no spaces, UTF-8; ValueError for NaN."""
    text = json.dumps(
        body, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return text.encode()


def _parse(data: bytes) -> dict[str, Any]:
    if len(data) > MAX_BYTES:
        raise CorruptError(f"it has {len(data)} bytes, at most {MAX_BYTES} are allowed")
    body = parse_json(data)
    if not isinstance(body, dict):
        raise CorruptError("it is not a JSON object")
    return body


def parse_json(data: bytes) -> object:
    """Parse stored JSON: no key twice, no NaN, bounded depth and digits, else CorruptError."""
    try:
        value: object = json.loads(
            data.decode(),
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_int=_bounded_int,
        )
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"it is not JSON: {error}") from error
    _check_depth(value, _MAX_DEPTH)
    return value


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise CorruptError("it has a key twice")
    return value


def _refuse_constant(text: str) -> NoReturn:
    raise CorruptError(f"it holds the number {text}")


def _bounded_int(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise CorruptError(f"it holds a number of {len(text)} digits")
    return int(text)


def _check_depth(value: object, left: int) -> None:
    if not isinstance(value, dict | list):
        return
    if left == 0:
        raise CorruptError(f"it is nested more than {_MAX_DEPTH} deep")
    for item in value.values() if isinstance(value, dict) else value:
        _check_depth(item, left - 1)
