"""The key that signs a run's commits, from where the configuration says."""

from __future__ import annotations

import os
from pathlib import Path

from esper_ray.config.storage import StorageConfig
from esper_ray.errors import ConfigError
from esper_ray.storage import SigningKey


def signing_key(storage: StorageConfig) -> SigningKey | None:
    """The key that the configuration names; ConfigError where it is not there."""
    if not storage.signing_key_env and not storage.signing_key_file:
        return None
    if storage.signing_key_env:
        where = storage.signing_key_env
        secret = os.environb.get(where.encode(), b"")
    else:
        where = storage.signing_key_file
        try:
            secret = Path(where).read_bytes()
        except OSError as error:
            raise ConfigError(f"the signing key {where} cannot be read: {error}") from error
    if not secret.strip():
        raise ConfigError(f"{where} holds no signing key", "set it, or leave the key out")
    return SigningKey(secret.strip())
