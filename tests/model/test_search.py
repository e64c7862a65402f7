"""The search itself, on spaces small enough to count by hand."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.model.search import Found, Step, Truncated, search


def _up_to_five(number: int) -> Iterator[Step[int]]:
    for by in (1, 2):
        if number + by <= 5:
            yield Step(f"+{by}", number + by, fair=by == 2)


def _search(wrong: int = -1, rest: tuple[int, ...] = (4, 5), limit: int = 6) -> Found:
    return search(
        0, _up_to_five, lambda n: "wrong" if n == wrong else "", lambda n: n in rest, limit
    )


def test_a_space_without_fault_is_counted() -> None:
    assert _search() == Found(states=6, steps=9, depth=3)


def test_the_shortest_trace_to_a_fault_is_found() -> None:
    found = _search(wrong=3)
    assert (found.wrong, len(found.trace)) == ("wrong", 2)
    assert set(found.trace) == {"+1", "+2"}


def test_a_state_from_which_fair_steps_do_not_lead_to_rest_is_wrong() -> None:
    found = _search(rest=(4,))
    assert found.trace == ("+1",)
    assert "fair steps alone never lead to rest" in str(found)


def test_a_space_larger_than_the_limit_is_an_error() -> None:
    with pytest.raises(Truncated, match="more than 5 states"):
        _search(limit=5)
