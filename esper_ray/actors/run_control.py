"""Speaks with the coordinator of a run that another process drives."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from esper_ray.actors.placement import NAMESPACE, Cluster, ClusterSettings, coordinator_name
from esper_ray.actors.stopping import Wish
from esper_ray.errors import ConfigError, EsperError, RunFailed, RunNotFound
from esper_ray.events.messages import Answer

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

_POLL_S = 0.2


class RunControl:
    """A connection to the run of a name on the cluster at `address`; use as a context manager.

    ClusterUnavailable where no cluster answers, RunNotFound where no such run is at work there or
    it ends meanwhile, RunFailed where it does not answer within `timeout_s`.
    """

    def __init__(self, run: str, address: str, timeout_s: float = 60.0) -> None:
        if address == "local":
            raise ConfigError(
                "a cluster that is `local` to another process cannot be joined",
                "give the HOST:PORT of a cluster that was started with `ray start --head`",
            )
        self._run, self._address, self._timeout_s = run, address, timeout_s
        self._cluster = Cluster(ClusterSettings(address, timeout_s, timeout_s))

    def __enter__(self) -> Self:
        """Connect and find the run."""
        self._cluster.connect(0)  # sets what Ray reads when it is first imported
        import ray

        try:
            self._handle: Any = ray.get_actor(coordinator_name(self._run), namespace=NAMESPACE)
            self._ask("ping")  # handles of actors that have ended are still handed out
        except ValueError as error:
            self._cluster.close()
            raise self._not_found() from error
        except EsperError:
            self._cluster.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Disconnect; the run goes on."""
        self._cluster.close()

    def request(self, action: str, layer_id: str, seed_ids: Sequence[int]) -> int:
        """See Runtime.request."""
        return int(self._ask("request", action, layer_id, list(seed_ids)))

    def answers(self, number: int, timeout_s: float) -> tuple[Answer, ...] | None:
        """What became of a request; None where that is not decided within `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while True:
            found: tuple[Answer, ...] | None = self._ask("answers", number)
            if found is not None or time.monotonic() > deadline:
                return found
            time.sleep(_POLL_S)

    def wish(self, wish: Wish) -> Wish:
        """Want the run to pause, go on or stop; what holds now."""
        held: Wish = self._ask("wish", wish)
        return held

    def ended(self, timeout_s: float) -> bool:
        """Wait for the end of the run; whether it came within `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                self._ask("ping")
            except RunNotFound:
                return True
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)

    def _ask(self, method: str, *args: object) -> Any:
        import ray
        from ray.exceptions import GetTimeoutError, RayError, RayTaskError

        try:
            return ray.get(getattr(self._handle, method).remote(*args), timeout=self._timeout_s)
        except RayTaskError as error:
            if isinstance(error.cause, EsperError):
                raise error.cause from None
            raise RunFailed(f"the coordinator of {self._run!r} failed: {error.cause!r}") from error
        except GetTimeoutError as error:
            raise RunFailed(
                f"run {self._run!r} does not answer within {self._timeout_s:.0f} s", "try again"
            ) from error
        except RayError as error:
            raise self._not_found() from error

    def _not_found(self) -> RunNotFound:
        return RunNotFound(
            f"no run named {self._run!r} is at work on the cluster at {self._address!r}",
            "check the name, which is `run` in the run file, and --address",
        )
