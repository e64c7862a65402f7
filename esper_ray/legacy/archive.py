"""What a `.pt` file declares as a zip archive, checked before torch sees it."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Sequence

from esper_ray.errors import UnsafeInputError

MAX_FILE_BYTES = 256 * 2**20
MAX_ENTRIES = 10_000
MAX_PICKLE_BYTES = 16 * 2**20

_NAME = re.compile(r"[\w.@=+-]{1,255}/(?:\.?[\w-]+/)?[\w.-]{1,64}", re.ASCII)
_ENCRYPTED = 0x1
_LOCAL_HEADER_BYTES = 30


def check_archive(data: bytes) -> None:
    """Raise UnsafeInputError unless `data` is a zip as torch.save writes it.

    Entries are stored, not deflated, lie beside one another inside the file, in one folder, under
    plain names, and hold one pickle of bounded size.
    """
    if len(data) > MAX_FILE_BYTES:
        raise UnsafeInputError(f"it has {len(data)} bytes, at most {MAX_FILE_BYTES} are read")
    if not data.startswith(b"PK\x03\x04"):
        raise UnsafeInputError(
            "it is no zip archive: torch wrote such files before version 1.6, or it is no .pt file",
            "load it where it is trusted, and save it again with a newer torch",
        )
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            comment = archive.comment
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError) as error:
        raise UnsafeInputError(f"it is no whole zip archive: {error}") from error
    if comment or not 1 <= len(entries) <= MAX_ENTRIES:
        raise UnsafeInputError(f"its archive has {len(entries)} entries or a comment")
    for entry in entries:
        _check_entry(entry, len(data))
    _check_together(entries)


def _check_entry(entry: zipfile.ZipInfo, size: int) -> None:
    name = entry.filename
    if not _NAME.fullmatch(name) or ".." in name:
        raise UnsafeInputError(f"its archive names {name[:80]!r}")
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
        raise UnsafeInputError(f"{name} in its archive is compressed", "torch.save stores it plain")
    if entry.flag_bits & _ENCRYPTED:
        raise UnsafeInputError(f"{name} in its archive is encrypted")
    if entry.header_offset < 0 or entry.header_offset + entry.file_size > size:
        raise UnsafeInputError(f"{name} in its archive lies outside the file")


def _check_together(entries: Sequence[zipfile.ZipInfo]) -> None:
    names = [entry.filename for entry in entries]
    if len({name.lower() for name in names}) != len(names):
        raise UnsafeInputError("its archive has a name twice")
    if len({name.partition("/")[0] for name in names}) != 1:
        raise UnsafeInputError("its archive has more than one folder")
    pickles = [entry for entry in entries if entry.filename.endswith(".pkl")]
    if [e.filename.partition("/")[2] for e in pickles] != ["data.pkl"]:
        raise UnsafeInputError("its archive does not hold the one pickle of torch.save")
    if pickles[0].file_size > MAX_PICKLE_BYTES:
        raise UnsafeInputError(f"its pickle has {pickles[0].file_size} bytes")
    end = 0
    for entry in sorted(entries, key=lambda entry: entry.header_offset):
        if entry.header_offset < end:
            raise UnsafeInputError("entries of its archive overlap")
        end = entry.header_offset + _LOCAL_HEADER_BYTES + entry.file_size
