"""What an object store's failure means, whatever its client calls it."""

from __future__ import annotations

import enum
from collections.abc import Iterator


class Failure(enum.Enum):
    """What to do about a failed call."""

    CONFLICT = "the object is there"
    ABSENT = "there is no such object, bucket or container"
    DENIED = "the credentials are refused or have expired"
    PASSING = "trying again may help"
    LASTING = "trying again does not help"


_CONFLICT_STATUS = {412}
# 409: a concurrent conditional write to the same S3 key; Azure's own conflict comes by type.
_PASSING_STATUS = {408, 409, 425, 429}
_DENIED_STATUS = {401, 403}
_CONFLICT_CODES = {"PreconditionFailed", "412", "BlobAlreadyExists", "conditionNotMet"}
_PASSING_CODES = {"RequestTimeout", "SlowDown", "RequestTimeoutException", "Throttling"}
_DENIED_CODES = {"AccessDenied", "ExpiredToken", "ExpiredTokenException", "InvalidToken"} | {
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "RequestTimeTooSkewed",
}
# By name: the clients are optional packages, and share no base class for it.
_DENIED_TYPES = {
    "ClientAuthenticationError",
    "CredentialRetrievalError",
    "CredentialUnavailableError",
    "DefaultCredentialsError",
    "NoCredentialsError",
    "PartialCredentialsError",
    "RefreshError",
    "TokenRetrievalError",
    "UnauthorizedSSOTokenError",
}
_LASTING_TYPES = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ImportError,
    NotImplementedError,
    Warning,
)


def classify(error: BaseException) -> Failure:
    """Read types, HTTP status and error code of an error and of its causes."""
    if isinstance(error, FileExistsError):
        return Failure.CONFLICT
    if isinstance(error, FileNotFoundError):
        return Failure.ABSENT
    chain = list(_causes(error))
    codes, statuses = {_code(e) for e in chain}, {_status(e) for e in chain}
    names = {type(e).__name__ for e in chain}
    if codes & _CONFLICT_CODES or statuses & _CONFLICT_STATUS:
        return Failure.CONFLICT
    if codes & _PASSING_CODES or statuses & _PASSING_STATUS or max(statuses) >= 500:
        return Failure.PASSING
    if codes & _DENIED_CODES or statuses & _DENIED_STATUS or names & _DENIED_TYPES:
        return Failure.DENIED
    # gcsfs tells a refusal only by these words.
    if isinstance(error, PermissionError) or str(error).startswith("Forbidden:"):
        return Failure.DENIED
    if 404 in statuses:
        return Failure.ABSENT
    if max(statuses) >= 400 or isinstance(error, _LASTING_TYPES):
        return Failure.LASTING
    return Failure.PASSING


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _code(error: BaseException) -> str:
    response = getattr(error, "response", None)  # botocore
    if isinstance(response, dict):
        return str(response.get("Error", {}).get("Code", ""))
    return str(getattr(error, "error_code", "") or "")  # Azure


def _status(error: BaseException) -> int:
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        value: object = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    else:
        value = getattr(error, "status_code", None)  # Azure
        if value is None and type(error).__name__ == "HttpError":
            value = getattr(error, "code", None)  # gcsfs, as a number or as text
        if value is None:
            value = getattr(error, "status", None)  # aiohttp
    return int(value) if isinstance(value, int | str) and str(value).isdigit() else 0
