"""Whether a store can tell the first of two writers from the second, asked before it is used."""

from __future__ import annotations

import contextlib
import secrets

from esper_ray.errors import CapabilityError, StorageUnavailable
from esper_ray.storage import objects
from esper_ray.storage.filesystem import Root


def check_conditional_create(root: Root) -> None:
    """Create a random name twice; CapabilityError unless the second time is a conflict.

    A root that is `unsafe` is not asked, nor a local disk, whose hard links are exclusive.
    """
    if root.local or root.unsafe:
        return
    path = f"probes/{secrets.token_hex(16)}"
    objects.create_or_confirm(root, path, b"first")
    try:
        root.create(path, b"second")
    except FileExistsError:
        refused = True
    else:
        refused = False
    kept = root.read(path, 16) == b"first"
    with contextlib.suppress(StorageUnavailable):  # some stores let nobody delete
        root.remove(path)
    if not (refused and kept):
        raise CapabilityError(
            f"{root.url} overwrites objects that it was told to create, so that two writers would "
            "destroy each other's commits",
            "use a store with conditional writes, or set storage.single_writer: unsafe and see to "
            "it that only one process ever writes there",
        )
