"""Ray's token: where it comes from, and when a client is told to show it."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from esper_ray.errors import ClusterUnavailable


def token_source() -> str:
    """Where Ray would take its token from, in words; empty where there is none.

    ClusterUnavailable for a file that is named and cannot be read.
    """
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "RAY_AUTH_TOKEN"
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    problem = "is empty"
    try:
        if path.read_text().strip():
            return str(path)
    except (OSError, UnicodeError) as error:
        problem = f"cannot be read: {error}"
    if not named:
        return ""
    raise ClusterUnavailable(
        f"the token file {path} {problem}", "set RAY_AUTH_TOKEN_PATH to the cluster's token file"
    )


def use_token(*, private: bool) -> None:
    """Authenticate where a token exists; a private cluster gets one that only its children see.

    Ray reads these variables when it is first imported.
    """
    known = token_source()
    if private and not known:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    if private or known:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
