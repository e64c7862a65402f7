"""Waits for the answers of actors, and finds out which of them do not answer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from esper_ray.actors.remote import RemoteActor
from esper_ray.errors import EsperError, RunFailed, StepFailed

Asked = Sequence[tuple[RemoteActor, Any]]


@dataclass(frozen=True, slots=True)
class Calls:
    """`timeout_s` is how long a step may take, `answer_s` how long any actor may be silent."""

    timeout_s: float
    answer_s: float

    def wait(self, pending: list[Any], watched: Sequence[RemoteActor] = ()) -> list[Any]:
        """Results in order, or the first failure: StepFailed where an actor is lost or hangs.

        Of `watched` actors, which must all be set up, one that does not answer is found sooner.
        """
        from ray.exceptions import RayError, RayTaskError

        try:
            return self._results(pending, watched)
        except RayTaskError as error:
            if isinstance(error.cause, EsperError):
                raise error.cause from None
            if isinstance(error.cause, RayError):
                raise _lost(error.cause) from error
            raise RunFailed(f"an actor failed: {error.cause!r}") from error
        except RayError as error:
            raise _lost(error) from error

    def answering(self, asked: Asked) -> list[RemoteActor]:
        """The actors that answer within `answer_s`."""
        import ray
        from ray.exceptions import RayError

        deadline, alive = time.monotonic() + self.answer_s, []
        for actor, answer in asked:
            try:
                ray.get(answer, timeout=max(0.0, deadline - time.monotonic()))
            except RayError:
                continue
            alive.append(actor)
        return alive

    def _results(self, pending: list[Any], watched: Sequence[RemoteActor]) -> list[Any]:
        """Wait for all, but not past the first that failed."""
        import ray

        left, heard = pending, time.monotonic()
        while left:
            patience_s = heard + self.timeout_s - time.monotonic()
            look_s = min(patience_s, self.answer_s) if watched else patience_s
            done, left = ray.wait(left, num_returns=1, timeout=max(0.0, look_s))
            if done:
                ray.get(done)
                heard = time.monotonic()
            elif look_s >= patience_s:
                raise StepFailed(
                    f"no step ended within {self.timeout_s:.0f} s",
                    "raise cluster.step_timeout_s if a step may take longer",
                )
            else:
                self._check(watched)
        return ray.get(pending)

    def _check(self, watched: Sequence[RemoteActor]) -> None:
        """StepFailed where an actor does not answer, whatever it is at."""
        alive = self.answering([(actor, actor.submit("ping")) for actor in watched])
        for actor in watched:
            if not any(actor is each for each in alive):
                raise StepFailed(f"{actor.handle!r} does not answer within {self.answer_s:.0f} s")


def _lost(error: Exception) -> StepFailed:
    return StepFailed(
        f"an actor is lost: {type(error).__name__}", "run the same command again with --resume auto"
    )
