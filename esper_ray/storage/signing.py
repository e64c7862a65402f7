"""Signatures of a run's records: a digest says that bytes are whole, a signature whose they are."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from esper_ray.errors import ConfigError, SignatureError
from esper_ray.storage import manifest

FIELD: Final = "signature"
MIN_BYTES: Final = 16
_ALGORITHM: Final = "hmac-sha256"


@dataclass(frozen=True, slots=True)
class SigningKey:
    """A secret of at least 16 bytes that the writers and readers of a run share."""

    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.secret) < MIN_BYTES:
            raise ConfigError(
                f"a signing key of {len(self.secret)} bytes is too short",
                f"use {MIN_BYTES} random bytes or more, for example `openssl rand -hex 32`",
            )

    def sign(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The body of a record with its signature."""
        return {**body, FIELD: {"algorithm": _ALGORITHM, "mac": self._mac(body)}}

    def check(self, body: Mapping[str, Any], where: str) -> None:
        """Raise SignatureError unless this key signed the body of a record."""
        signature = body.get(FIELD)
        if not isinstance(signature, dict):
            raise SignatureError(
                f"{where} is not signed",
                "it was stored without the key, or by somebody who does not have it",
            )
        bare = {name: value for name, value in body.items() if name != FIELD}
        told = signature.get("mac")
        known = signature.get("algorithm") == _ALGORITHM and isinstance(told, str)
        if not known or not hmac.compare_digest(str(told).encode(), self._mac(bare).encode()):
            raise SignatureError(
                f"{where} is signed with another key, or was changed since",
                "check the signing key; a record that others have written is not to be trusted",
            )

    def _mac(self, body: Mapping[str, Any]) -> str:
        return hmac.new(self.secret, manifest.canonical(body), hashlib.sha256).hexdigest()


def sign(body: dict[str, Any], key: SigningKey | None) -> dict[str, Any]:
    """The body as it is to be stored."""
    return body if key is None else key.sign(body)


def checked(body: dict[str, Any], key: SigningKey | None, where: str) -> dict[str, Any]:
    """The body without its signature, which must be right if there is a key."""
    if key is not None:
        key.check(body, where)
    return {name: value for name, value in body.items() if name != FIELD}
