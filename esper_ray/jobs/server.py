"""A cluster's job server: submits, looks at, follows and ends jobs over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from esper_ray.actors.tokens import token_source, use_token
from esper_ray.errors import ClusterUnavailable, ConfigError, RunFailed, RunNotFound

_CONNECT_S = 5.0
_POLL_S = 0.3
_ENDED: Final = frozenset({"stopped", "succeeded", "failed"})
_CHATTY: Final = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
TERMINATED: Final = 143
"""Exit code of a job that was stopped by a signal, whose own Ray does not keep."""


@dataclass(frozen=True, slots=True)
class Job:
    """What the server says of a job that `submit` made; times are UNIX seconds, 0 if unknown."""

    job: str
    run: str
    status: str
    exit_code: int | None
    config_sha256: str
    storage_url: str
    started: float
    ended: float
    message: str
    entrypoint: str

    @property
    def at_work(self) -> bool:
        """Whether it may still change."""
        return self.status not in _ENDED

    @classmethod
    def read(cls, details: Any) -> Job:
        """From Ray's JobDetails."""
        told = details.metadata or {}
        code = details.driver_exit_code
        status = str(details.status.value).lower()
        return cls(
            job=details.submission_id or "",
            run=told.get("run", ""),
            status=status,
            exit_code=TERMINATED if code is None and status == "stopped" else code,
            config_sha256=told.get("config_sha256", ""),
            storage_url=told.get("storage_url", ""),
            started=(details.start_time or 0) / 1000,
            ended=(details.end_time or 0) / 1000,
            message=details.message or "",
            entrypoint=details.entrypoint,
        )


class JobServer:
    """The job server at `http://HOST:PORT`, which is the dashboard's address.

    ClusterUnavailable where none answers or it refuses this client, ConfigError for another form.
    """

    def __init__(self, address: str) -> None:
        if not address.startswith(("http://", "https://")):
            raise ConfigError(
                f"--address {address!r} is not the URL of a job server",
                "give http://HOST:8265, the dashboard of the cluster's head",
            )
        self.address = address.rstrip("/")
        use_token(private=False)
        self._probe()
        # Ray prefers these variables to the address that it is given.
        os.environ["RAY_API_SERVER_ADDRESS"] = self.address
        with self._told():
            from ray.job_submission import JobSubmissionClient

            for name in _CHATTY:
                logging.getLogger(name).setLevel(logging.WARNING)
            self._client = JobSubmissionClient(self.address)

    def submit(
        self, entrypoint: str, job: str, environment: Mapping[str, Any], told: Mapping[str, str]
    ) -> None:
        """Upload what the runtime environment names and start the job of that id."""
        with self._told():
            self._client.submit_job(
                entrypoint=entrypoint,
                submission_id=job,
                runtime_env=dict(environment),
                metadata=dict(told),
            )

    def jobs(self) -> list[Job]:
        """Every job that says which run it is, newest first."""
        with self._told():
            found = [Job.read(details) for details in self._client.list_jobs()]
        return sorted((job for job in found if job.run and job.job), key=lambda job: -job.started)

    def find(self, name: str) -> Job:
        """A job by its id, or the newest of a run by its name or storage URL; else RunNotFound."""
        jobs = self.jobs()
        for job in [j for j in jobs if j.job == name] + jobs:
            if name in (job.job, job.run, job.storage_url):
                return job
        raise RunNotFound(
            f"{self.address} has no job of {name!r}", "`esper-ray status` lists those it has"
        )

    def get(self, job: str) -> Job:
        """The job of that id as it is now."""
        with self._told():
            return Job.read(self._client.get_job_info(job))

    def environment(self, job: Job) -> dict[str, Any]:
        """The runtime environment of a job, its uploaded package by URI."""
        with self._told():
            return dict(self._client.get_job_info(job.job).runtime_env or {})

    def logs(self, job: Job) -> str:
        """All that it has written to stdout and stderr."""
        with self._told():
            return str(self._client.get_job_logs(job.job))

    def follow(self, job: Job, write: Callable[[str], None]) -> Job:
        """Pass its output on as it comes, until it has ended; how it ended."""
        written, whole = 0, False
        while True:
            with self._told():
                written, whole = asyncio.run(self._tail(job.job, written, write))
            if whole and not (now := self.get(job.job)).at_work:
                return now
            time.sleep(_POLL_S)

    async def _tail(self, job: str, skip: int, write: Callable[[str], None]) -> tuple[int, bool]:
        """Write what follows the first `skip` characters; how many there are, and if that is all.

        A connection that breaks is made again, or the next request finds that it is for good.
        """
        seen = 0
        try:
            async for text in self._client.tail_job_logs(job):
                if fresh := text[max(0, skip - seen) :]:
                    write(fresh)
                seen += len(text)
        except RuntimeError:  # what Ray's client makes of it
            return max(seen, skip), False
        return max(seen, skip), True

    def wait(self, job: Job, timeout_s: float) -> Job:
        """The job when it has ended, or as it is after that long."""
        deadline = time.monotonic() + timeout_s
        while (now := self.get(job.job)).at_work and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        return now

    def terminate(self, job: Job) -> bool:
        """Send SIGTERM, then SIGKILL after RAY_JOB_STOP_WAIT_TIME_S; False if it is over."""
        with self._told():
            return bool(self._client.stop_job(job.job))

    def _probe(self) -> None:
        """Fail in seconds, and in our words, where Ray would wait or print a traceback."""
        try:
            with urllib.request.urlopen(f"{self.address}/api/version", timeout=_CONNECT_S) as reply:
                known = "ray_version" in json.loads(reply.read(1 << 16))
        except urllib.error.HTTPError as error:
            error.close()
            known = error.code in (401, 403)
        except (OSError, ValueError) as error:
            raise self._unreachable(error) from error
        if not known:
            raise self._unreachable("something else than Ray listens there")

    def _unreachable(self, why: object) -> ClusterUnavailable:
        return ClusterUnavailable(
            f"no Ray job server answers at {self.address}: {why}",
            "check the address, which is the dashboard's, and that the head runs",
        )

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Turn what Ray's client raises into errors of ours."""
        import aiohttp
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError as error:
            raise self._refused() from error
        except aiohttp.WSServerHandshakeError as error:
            raise self._unreachable(f"HTTP {error.status}") from error
        except (OSError, aiohttp.ClientError) as error:  # requests' own errors are OSErrors
            raise self._unreachable(type(error).__name__) from error
        except RuntimeError as error:
            raise RunFailed(f"{self.address} says: {str(error)[:500]}") from error

    def _refused(self) -> ClusterUnavailable:
        source = token_source()
        if not source:
            return ClusterUnavailable(
                f"{self.address} wants a token, and there is none here",
                "set RAY_AUTH_TOKEN_PATH to a file with the cluster's token, mode 0600",
            )
        mode = os.environ.get("RAY_AUTH_MODE")
        if mode != "token":
            return ClusterUnavailable(
                f"{self.address} wants a token, and RAY_AUTH_MODE is {mode!r} here",
                "unset RAY_AUTH_MODE, or set it to token",
            )
        return ClusterUnavailable(
            f"{self.address} refuses the token of {source}",
            "set RAY_AUTH_TOKEN_PATH to a file with that cluster's token, mode 0600",
        )
