"""The memory of another process as a replica of what is stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from esper_ray.actors.remote import RemoteActor
from esper_ray.errors import EsperError, StorageUnavailable
from esper_ray.storage.memory_replica import LIMIT, MemoryReplica

if TYPE_CHECKING:
    from ray import ObjectRef


@dataclass(frozen=True, slots=True)
class Peer:
    """A MemoryReplica that is an actor, called like a plain one; may be sent to other actors.

    StorageUnavailable where the actor is lost or does not answer within `timeout_s` seconds.
    """

    actor: RemoteActor
    url: str
    timeout_s: float = 30.0

    @classmethod
    def start(cls, limit: int = LIMIT, **options: object) -> Self:
        """Start the actor with Ray's `options`, which say where; it holds up to `limit` bytes."""
        import ray

        actor: Any = ray.remote(MemoryReplica)
        handle = actor.options(**options).remote(limit)
        return cls(RemoteActor(handle), f"actor {handle._actor_id.hex()}")

    def read(self, path: str, limit: int) -> bytes:
        """See Replica."""
        data: bytes = self._answer(self.actor.submit("read", path, limit))
        return data

    def replace(self, path: str, data: bytes) -> None:
        """See WritableReplica."""
        self._answer(self.actor.submit("replace", path, data))

    def _answer(self, asked: ObjectRef[Any]) -> Any:
        import ray
        from ray.exceptions import RayError, RayTaskError

        try:
            return ray.get(asked, timeout=self.timeout_s)
        except RayTaskError as error:
            if isinstance(error.cause, FileNotFoundError | EsperError):
                raise error.cause from None
            raise StorageUnavailable(f"{self.url} failed: {error.cause!r}") from error
        except RayError as error:
            raise StorageUnavailable(f"{self.url} is lost: {type(error).__name__}") from error
