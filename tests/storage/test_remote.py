"""What a failed call to an object store means, how often it is made again, and what is said."""

from __future__ import annotations

import errno
import time
from typing import Any

import pytest
from fsspec.exceptions import FSTimeoutError

from esper_ray.errors import CorruptError, StorageUnavailable
from esper_ray.storage.filesystem import Root
from esper_ray.storage.remote_errors import Failure, classify
from tests.servers.fixtures import Place, azure_connection, s3_options
from tests.servers.processes import free_port


class ClientError(Exception):
    """Shaped as botocore's error."""

    def __init__(self, code: str, status: int = 0) -> None:
        super().__init__(code)
        self.response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}


class HttpError(Exception):
    """Shaped as gcsfs' error, whose code may be text."""

    def __init__(self, code: int | str) -> None:
        super().__init__("no reason")
        self.code = code


class HttpResponseError(Exception):
    """Shaped as Azure's error."""

    def __init__(self, status_code: int, error_code: str = "") -> None:
        super().__init__("no reason")
        self.status_code, self.error_code = status_code, error_code


class NoCredentialsError(Exception):
    """Known by its name."""


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (FileExistsError(), Failure.CONFLICT),
        (FileNotFoundError(), Failure.ABSENT),
        (caused(OSError(errno.EINVAL, "Invalid"), ClientError("412", 412)), Failure.CONFLICT),
        (ClientError("PreconditionFailed"), Failure.CONFLICT),
        (ClientError("ConditionalRequestConflict", 409), Failure.PASSING),
        (caused(OSError(errno.EIO, "?"), ClientError("InternalError", 500)), Failure.PASSING),
        (ClientError("SlowDown", 503), Failure.PASSING),
        (ClientError("RequestTimeout", 400), Failure.PASSING),
        (ClientError("AccessDenied", 403), Failure.DENIED),
        (caused(PermissionError("?"), ClientError("ExpiredToken", 400)), Failure.DENIED),
        (ClientError("NoSuchBucket", 404), Failure.ABSENT),
        (ClientError("InvalidBucketName", 400), Failure.LASTING),
        (HttpError("503"), Failure.PASSING),
        (HttpError(401), Failure.DENIED),
        (HttpError(400), Failure.LASTING),
        (OSError("Forbidden: path\nno"), Failure.DENIED),
        (HttpResponseError(409, "BlobAlreadyExists"), Failure.CONFLICT),
        (HttpResponseError(409, "ContainerBeingDeleted"), Failure.PASSING),
        (HttpResponseError(404), Failure.ABSENT),
        (NoCredentialsError(), Failure.DENIED),
        (FSTimeoutError(), Failure.PASSING),
        (TimeoutError(), Failure.PASSING),
        (ConnectionRefusedError(), Failure.PASSING),
        (TypeError("unexpected option"), Failure.LASTING),
        (Exception("never seen"), Failure.PASSING),
    ],
)
def test_failure_is_read_from_type_status_and_code(error: Exception, failure: Failure) -> None:
    assert classify(error) is failure


class FlakyRoot(Root):
    """A root whose calls fail with the errors of a list before they work."""

    errors: list[Exception]
    attempts = 0
    renewals = 0

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.errors, attempt, renew = [], self._remote._attempt, self._remote._renew
        remote: Any = self._remote

        def flaky(*args: Any) -> Any:
            self.attempts += 1
            if self.errors:
                raise self.errors.pop(0)
            return attempt(*args)

        def counted() -> None:
            self.renewals += 1
            renew()

        remote._attempt, remote._renew = flaky, counted


@pytest.fixture
def flaky() -> FlakyRoot:
    root = FlakyRoot.open(f"memory://flaky{time.time_ns()}", timeout_s=0.3)
    assert isinstance(root, FlakyRoot)
    return root


def test_passing_failures_are_waited_out(flaky: FlakyRoot) -> None:
    flaky.errors = [ClientError("InternalError", 500), FSTimeoutError()]
    flaky.create("x", b"1")
    assert (flaky.attempts, flaky.read("x", 1)) == (3, b"1")


def test_lasting_trouble_ends_at_the_deadline_and_names_url_and_remedy(flaky: FlakyRoot) -> None:
    flaky.errors = [ClientError("InternalError", 500)] * 99
    began = time.monotonic()
    with pytest.raises(StorageUnavailable, match=f"cannot write {flaky.url}/x") as caught:
        flaky.create("x", b"1")
    assert time.monotonic() - began < 1
    assert "tried for 0.3 s" in caught.value.hint
    assert flaky.attempts > 1


def test_silence_is_reported_as_such(flaky: FlakyRoot) -> None:
    flaky.errors = [FSTimeoutError()] * 99
    with pytest.raises(StorageUnavailable, match="no answer in time"):
        flaky.names("commits")


def test_failure_that_cannot_pass_is_not_repeated(flaky: FlakyRoot) -> None:
    flaky.errors = [ClientError("InvalidBucketName", 400)]
    with pytest.raises(StorageUnavailable, match="InvalidBucketName"):
        flaky.read("x", 1)
    assert flaky.attempts == 1


def test_refused_credentials_are_read_again_once(flaky: FlakyRoot) -> None:
    flaky.errors = [ClientError("ExpiredToken", 400)]
    flaky.create("x", b"1")
    assert flaky.renewals == 1
    assert flaky.read("x", 1) == b"1"
    flaky.errors = [ClientError("AccessDenied", 403)] * 2
    with pytest.raises(StorageUnavailable, match="AccessDenied") as caught:
        flaky.replace("x", b"2")
    assert "credentials" in caught.value.hint
    assert flaky.renewals == 2


def test_write_without_its_bucket_says_so(flaky: FlakyRoot) -> None:
    flaky.errors = [ClientError("NoSuchBucket", 404)]
    with pytest.raises(StorageUnavailable, match="cannot write") as caught:
        flaky.create("x", b"1")
    assert "create this bucket" in caught.value.hint


def test_truncated_reply_is_refused(flaky: FlakyRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"info": {"size": 5}, "cat_file": b"123"}
    monkeypatch.setattr(flaky._remote, "_attempt", lambda method, *_: answers[method])
    with pytest.raises(CorruptError, match="3 of 5"):
        flaky.read("x", 10)


@pytest.mark.parametrize("url", ["memory://a?b", "memory://a/b#1"])
def test_url_with_characters_that_clients_interpret_is_refused(url: str) -> None:
    with pytest.raises(StorageUnavailable, match="characters"):
        Root.open(url)


# ------------------------------------------------------------------ a real server


@pytest.mark.s3
def test_credentials_that_changed_are_read_again_within_the_call(
    weed: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    from_environment = {k: v for k, v in weed.options.items() if k not in ("key", "secret")}
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "expired")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "expired")
    root = Root.open(f"{weed.url}/credentials{time.time_ns()}", from_environment, timeout_s=20)
    with pytest.raises(StorageUnavailable, match=root.url) as caught:
        root.create("x", b"1")
    assert "check your credentials" in caught.value.hint
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", weed.options["key"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", weed.options["secret"])
    root.create("x", b"1")
    assert root.read("x", 1) == b"1"


ABSENT = [
    "moto",
    pytest.param("gcs", marks=pytest.mark.gcs),
    pytest.param("azurite", marks=pytest.mark.az),
]


@pytest.mark.parametrize("store", ABSENT)
def test_bucket_that_does_not_exist_is_named(store: str, request: pytest.FixtureRequest) -> None:
    place: Place = request.getfixturevalue(store)
    url = f"{place.url.partition('://')[0]}://no-such-bucket/run"
    root = Root.open(url, place.options, timeout_s=5)
    assert root.names("") == []
    with pytest.raises(StorageUnavailable, match=f"{url}/x") as caught:
        root.create("x", b"1")
    assert "create this bucket" in caught.value.hint


@pytest.mark.parametrize("url", ["s3://esper/run", "gs://esper/run", "az://esper/run"])
def test_endpoint_where_nobody_listens_is_named_within_the_time(url: str) -> None:
    nobody = f"http://127.0.0.1:{free_port()}"
    options: dict[str, Any] = {
        "s3": s3_options(nobody),
        "gs": {"token": "anon", "endpoint_url": nobody},
        "az": {"connection_string": azure_connection(nobody)},
    }[url.partition(":")[0]]
    root = Root.open(url, options, timeout_s=1.5)
    began = time.monotonic()
    with pytest.raises(StorageUnavailable, match=f"cannot read {url}/x") as caught:
        root.read("x", 1)
    assert time.monotonic() - began < 4
    assert "check that the URL and its endpoint answer" in caught.value.hint
