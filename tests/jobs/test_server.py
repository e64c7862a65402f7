"""The client of a job server: who answers, and what its answers mean."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from esper_ray.errors import ClusterUnavailable, ConfigError
from esper_ray.jobs.server import TERMINATED, Job, JobServer


class Answering(http.server.BaseHTTPRequestHandler):
    """Answers every request alike."""

    status, body = 200, b"{}"

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def url(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    status, body = request.param
    handler = type("Handler", (Answering,), {"status": status, "body": body})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("url", [(200, b"<html>"), (200, b'{"a": 1}'), (500, b"")], indirect=True)
def test_server_of_another_kind_is_not_ray(url: str) -> None:
    with pytest.raises(ClusterUnavailable, match="no Ray job server answers at"):
        JobServer(url)


@pytest.mark.parametrize("url", [(401, b"no"), (403, b"no")], indirect=True)
def test_refused_token_is_named_by_where_it_is_from(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "never shown")
    with pytest.raises(ClusterUnavailable, match="refuses the token of RAY_AUTH_TOKEN") as caught:
        JobServer(url)
    assert "never shown" not in str(caught.value)


VERSION = json.dumps({"ray_version": "1.0.0", "version": "4", "ray_commit": "x"}).encode()


@pytest.mark.parametrize("url", [(200, VERSION)], indirect=True)
def test_cluster_without_jobs_says_so(url: str) -> None:
    from esper_ray.errors import RunFailed

    with pytest.raises(RunFailed, match=r"1\.0\.0 is running on the cluster"):
        JobServer(url)


@pytest.mark.parametrize("address", ["", "auto", "127.0.0.1:6379", "ray://host:10001", "ftp://x"])
def test_address_that_is_no_url_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="is not the URL of a job server"):
        JobServer(address)


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        ("PENDING", None, None),
        ("RUNNING", None, None),
        ("SUCCEEDED", 0, 0),
        ("FAILED", 7, 7),
        ("FAILED", None, None),
        ("STOPPED", None, TERMINATED),
    ],
)
def test_job_has_the_code_of_its_entrypoint(
    status: str, code: int | None, expected: int | None
) -> None:
    details = SimpleNamespace(
        metadata={"run": "r"},
        driver_exit_code=code,
        status=SimpleNamespace(value=status),
        submission_id="r-1",
        start_time=1000,
        end_time=None,
        message=None,
        entrypoint="python -m esper_ray",
    )
    job = Job.read(details)
    assert (job.status, job.exit_code) == (status.lower(), expected)
    assert job.at_work is (status in ("PENDING", "RUNNING"))
    assert (job.started, job.ended) == (1.0, 0.0)
