"""Checks of the rows of a batch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def repeated(ids: NDArray[np.int64]) -> NDArray[np.bool_]:
    """True for every row whose id stands in the batch more than once."""
    repeats = np.zeros(len(ids), dtype=np.bool_)
    if len(ids) < 2 or np.count_nonzero(ids[1:] > ids[:-1]) == len(ids) - 1:
        return repeats
    order = np.argsort(ids, kind="stable")
    same = ids[order[1:]] == ids[order[:-1]]
    repeats[order[1:][same]] = repeats[order[:-1][same]] = True
    return repeats
