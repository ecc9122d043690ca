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
