"""A Ray actor handle that knows which concurrency group each method belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle


@dataclass(frozen=True, slots=True)
class RemoteActor:
    """Calls methods of an actor; may itself be sent to other actors."""

    handle: ActorHandle[Any]
    groups: Mapping[str, str] = field(default_factory=dict)

    def submit(self, method: str, *args: object) -> ObjectRef[Any]:
        """Call and return the reference of the result."""
        bound = getattr(self.handle, method)
        group = self.groups.get(method)
        if group is not None:
            bound = bound.options(concurrency_group=group)
        reference: ObjectRef[Any] = bound.remote(*args)
        return reference

    def tell(self, method: str, *args: object) -> None:
        """Call without waiting; a failure shows in the calls that are waited for."""
        self.submit(method, *args)

    async def ask(self, method: str, *args: object) -> Any:
        """Call and wait for the result."""
        return await self.submit(method, *args)
