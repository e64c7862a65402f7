"""What the parts of a run file are made of: numbers with bounds, and no unknown keys."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Size = Annotated[int, Field(ge=1, le=1_000_000)]  # what no machine holds, no allocator is asked for
Positive = Annotated[int, Field(ge=1, le=1_000_000_000)]
NotNegative = Annotated[int, Field(ge=0, le=1_000_000_000)]
Rate = Annotated[float, Field(gt=0, lt=1e3)]
Fraction = Annotated[float, Field(ge=0, le=1)]
MOST_INT16 = 2**15 - 1  # columns of the seed state count in int16


class Section(BaseModel):
    """A part of the run file; unknown keys are refused."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )
