"""What is wanted of a run, and the signal that asks for its end."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from esper_ray.actors.stopping import StopSignal, Wish


@pytest.mark.parametrize("newer", list(Wish))
@pytest.mark.parametrize("older", list(Wish))
def test_the_newest_wish_holds_but_a_stop_stays(older: Wish, newer: Wish) -> None:
    assert older.then(newer) is (Wish.STOP if older is Wish.STOP else newer)


def test_a_signal_only_sets_the_flag_and_the_listener_before_is_restored() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _frame: heard.append(number))
    try:
        with StopSignal() as term:
            flags = [term.came]
            os.kill(os.getpid(), signal.SIGTERM)
            assert [*flags, term.came] == [False, True]
        assert heard == []
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_outside_of_the_main_thread_nothing_listens() -> None:
    before = signal.getsignal(signal.SIGTERM)
    found: list[object] = []

    def enter() -> None:
        with StopSignal() as term:
            found.extend([signal.getsignal(signal.SIGTERM), term.came])

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [before, False]
