"""Why one row of a batch was refused."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Refusal(IntEnum):
    """Reason code of a row; 0 means accepted, or applied."""

    NONE = 0
    UNKNOWN_SEED = 1
    DUPLICATE_SEED = 2
    STALE_GENERATION = 3
    STALE_STATE = 4
    UNKNOWN_STATE = 5
    TERMINAL = 6
    NOT_IN_TABLE = 7
    TOO_EARLY = 8
    GATE = 9
    BUDGET = 10
    EMBARGO = 11
    REPLANTING_OFF = 12
    UNKNOWN_STRATEGY = 13
    NOT_FINITE = 14
    GENERATIONS_USED_UP = 15
    BATCH_REFUSED = 16
    UNKNOWN_CAUSE = 17
    NO_BLUEPRINT = 18


REASONS = {
    Refusal.NONE: "accepted",
    Refusal.UNKNOWN_SEED: "the layer has no seed of that id",
    Refusal.DUPLICATE_SEED: "the batch names the seed more than once",
    Refusal.STALE_GENERATION: "the seed is of another generation",
    Refusal.STALE_STATE: "the seed is in another state than expected",
    Refusal.UNKNOWN_STATE: "no state has that number",
    Refusal.TERMINAL: "the state is terminal",
    Refusal.NOT_IN_TABLE: "the move is not in the table",
    Refusal.TOO_EARLY: "the minimum number of epochs has not passed",
    Refusal.GATE: "the gate did not open",
    Refusal.BUDGET: "the budget of the target state is used up",
    Refusal.EMBARGO: "the seed was culled too recently",
    Refusal.REPLANTING_OFF: "replanting is off",
    Refusal.UNKNOWN_STRATEGY: "no grafting strategy has that number",
    Refusal.NOT_FINITE: "a metric is not a finite number",
    Refusal.GENERATIONS_USED_UP: "the seed has no generation left",
    Refusal.BATCH_REFUSED: "another row of the batch was refused",
    Refusal.UNKNOWN_CAUSE: "no cause has that number",
    Refusal.NO_BLUEPRINT: "the state needs a blueprint, and the seed has none",
}


def first_failed(
    codes: Sequence[Refusal], failed: Sequence[NDArray[np.bool_]]
) -> NDArray[np.uint8]:
    """(rows,) code of the first check that a row has failed; 0 where it has failed none."""
    reason = np.zeros(len(failed[0]), dtype=np.uint8)
    for code, rows in zip(reversed(codes), reversed(failed), strict=True):
        if np.count_nonzero(rows):
            reason[rows] = code
    return reason


def below(numbers: NDArray[np.integer[Any]], limit: int) -> NDArray[np.bool_]:
    """(rows,) True where 0 <= number < limit; seen as unsigned, a negative number is large."""
    unsigned = numbers.view(f"u{numbers.dtype.itemsize}")
    inside: NDArray[np.bool_] = unsigned < limit
    return inside
