"""Names under which what seeds do shows in a profile."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Final

import torch

_nothing: Final = nullcontext()


def profiled(layer_id: str, phase: str) -> AbstractContextManager[object]:
    """A range `esper_ray/<layer>/<phase>` of a running profile; costs nothing where none runs."""
    # A range that nobody sees would take microseconds.
    if not torch.autograd._profiler_enabled():  # type: ignore[attr-defined]
        return _nothing
    return torch.profiler.record_function(f"esper_ray/{layer_id}/{phase}")
