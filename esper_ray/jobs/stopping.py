"""Ends a job: by a wish that its run takes at an epoch boundary, or by a signal."""

from __future__ import annotations

import secrets
import shlex
from collections.abc import Callable
from typing import Final

from esper_ray.errors import RunFailed
from esper_ray.jobs.server import Job, JobServer

_PATIENCE_S: Final = 600.0


def stop_job(
    server: JobServer, job: Job, note: Callable[[str], None], wait_s: float, now: bool
) -> Job:
    """Have a job's run stored and ended at its next epoch boundary, or by SIGTERM with `now`.

    The wish is brought by a second job, on the cluster: a signal would leave the run only
    RAY_JOB_STOP_WAIT_TIME_S to store itself. A run that takes no wish, as it is still starting,
    gets the signal. RunFailed where it has not ended within `wait_s`, by default ten minutes.
    """
    patience_s = wait_s or _PATIENCE_S
    if job.at_work and not now and not _told(server, job, patience_s):
        note(f"{job.job} takes no wishes: sending it SIGTERM")
        now = True
    if job.at_work and now:
        server.terminate(job)
    ended = server.wait(job, patience_s)
    if ended.at_work:
        raise RunFailed(f"{job.job} has not ended within {patience_s:g} s", "wait on, or add --now")
    return ended


def _told(server: JobServer, job: Job, patience_s: float) -> bool:
    """Whether a helper on the cluster could tell the run to stop."""
    python = (shlex.split(job.entrypoint) or ["python"])[0]
    words = [python, "-m", "esper_ray", "stop", job.run, "--address", "auto"]
    name = f"{job.job}-stop-{secrets.token_hex(2)}"
    server.submit(shlex.join(words), name, server.environment(job), {"stops": job.job})
    return server.wait(server.get(name), patience_s).exit_code == 0
