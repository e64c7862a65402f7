"""Which micro-batch a stage computes when: one forward, one backward (1F1B).

Schedule: Narayanan et al., PipeDream, SOSP 2019; flushed every step as in PipeDream-Flush.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple


class Kind(Enum):
    """Direction of an operation."""

    FORWARD = "forward"
    BACKWARD = "backward"


class Op(NamedTuple):
    """One micro-batch in one direction."""

    kind: Kind
    micro_batch: int


def plan(stage: int, stages: int, micro_batches: int) -> list[Op]:
    """The operations of one step of one stage; at most min(stages - stage, micro_batches) are
    in flight, and both directions visit micro-batches in ascending order."""
    if not 0 <= stage < stages or micro_batches < 1:
        raise ValueError(f"no schedule for stage {stage} of {stages}, {micro_batches} pieces")
    warm_up = min(stages - 1 - stage, micro_batches)
    forwards = [Op(Kind.FORWARD, i) for i in range(micro_batches)]
    backwards = [Op(Kind.BACKWARD, i) for i in range(micro_batches)]
    steady = zip(forwards[warm_up:], backwards, strict=False)
    ops = forwards[:warm_up] + [op for pair in steady for op in pair]
    return ops + backwards[micro_batches - warm_up :]
