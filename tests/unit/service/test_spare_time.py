import os
import sys
import threading

import pytest

from model_registry.spare_time import beside_requests, spare

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="the scheduler of Linux")


def where() -> tuple[int, int]:
    """The thread, and its scheduling policy."""
    return threading.get_ident(), os.sched_getscheduler(0)


@linux_only
def test_only_what_is_spared_while_requests_wait_takes_spare_time() -> None:
    own = where()
    assert spare(where) == own and beside_requests(lambda: spare(where), are_waiting=False) == own
    during, (spared, policy), after = beside_requests(lambda: (where(), spare(where), where()), are_waiting=True)
    assert during == after == own and spared != own[0] and policy == os.SCHED_IDLE
    assert spare(where) == own, "no request waits any more"


def test_an_error_ends_it() -> None:
    def fails() -> None:
        spare(int, "no number")

    for are_waiting in (True, False):
        with pytest.raises(ValueError, match="no number"):
            beside_requests(fails, are_waiting=are_waiting)
    assert spare(int, "1") == 1


@linux_only
def test_what_finds_too_little_spare_time_is_computed_by_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model_registry.spare_time._PATIENCE_S", 0.05)
    never, threads = threading.Event(), []

    def waits() -> int:
        threads.append(where())
        return 1 if never.wait(0 if len(threads) > 1 else 20) else 2

    assert beside_requests(lambda: spare(waits), are_waiting=True) == 2
    never.set()
    assert [policy == os.SCHED_IDLE for _, policy in threads] == [True, False] and threads[1][
        0
    ] == threading.get_ident()
