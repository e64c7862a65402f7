"""Storage URLs: their scheme, the file system behind it, and the package that it needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import fsspec

from esper_ray.errors import StorageUnavailable

_EXTRAS = {
    "s3": "s3",
    "s3a": "s3",
    "gs": "gcs",
    "gcs": "gcs",
    "az": "azure",
    "abfs": "azure",
    "abfss": "azure",
}


def split_scheme(url: str) -> tuple[str, str]:
    """Scheme and rest of a URL; a plain path is of scheme "file"."""
    if not url.strip():
        raise StorageUnavailable(
            "the storage URL is empty", "give a folder or a URL such as s3://bucket/run"
        )
    scheme, separator, rest = url.partition("://")
    if not separator:
        return "file", url
    return ("file" if scheme == "local" else scheme), rest


def make_file_system(scheme: str, url: str, options: Mapping[str, object]) -> Any:
    """The fsspec file system of a scheme; StorageUnavailable names the remedy if there is none."""
    try:
        kind = fsspec.get_filesystem_class(scheme)
    except ValueError as error:
        raise StorageUnavailable(
            f"{url} has the unknown scheme {scheme!r}",
            "use a plain path, file://, s3://, gs://, az:// or memory://",
        ) from error
    except ImportError as error:
        extra = _EXTRAS.get(scheme)
        hint = f"pip install 'esper-ray[{extra}]'" if extra else str(error)
        raise StorageUnavailable(f"{url} needs a package that is not installed", hint) from error
    # A cached listing, kept by another part of this process, would hide new commits.
    fresh = {"use_listings_cache": False} if scheme in _EXTRAS else {}
    try:
        return kind(**{**fresh, **options})
    except Exception as error:
        raise StorageUnavailable(
            f"{url} cannot be opened: {error}", "check the URL and its storage options"
        ) from error
