"""A waiting process: it is handed over once, replaced when it dies, and never has an old environment."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from functools import partial

import pytest

from finetune.worker.child import get_ready
from finetune.worker.warm_child import SpareChild, child_command, close_pipes, end_child

ECHO = [sys.executable, "-c", "import sys; line = sys.stdin.readline(); print(line.upper(), end='', flush=True)"]
DIES = [sys.executable, "-c", ""]
ENVIRONMENT = {"A": "1"}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def spare(clock: Clock) -> Iterator[SpareChild]:
    made = SpareChild(ECHO, clock=clock)
    yield made
    made.close()


def test_the_one_that_waits_is_handed_over_once_and_takes_the_job(spare: SpareChild) -> None:
    spare.prepare(ENVIRONMENT)
    waiting = spare.pid
    spare.prepare(ENVIRONMENT)
    assert spare.pid == waiting
    child = spare.take(ENVIRONMENT)
    assert child is not None and child.pid == waiting
    assert spare.take(ENVIRONMENT) is None
    output, _ = child.communicate("job\n")
    assert output == "JOB\n"


def test_another_environment_gets_none_and_ends_it(spare: SpareChild) -> None:
    spare.prepare(ENVIRONMENT)
    old = spare._waiting
    assert old is not None
    assert spare.take({"A": "2"}) is None
    assert old.child.poll() is not None
    spare.prepare({"A": "2"})
    fitting = spare.take({"A": "2"})
    assert fitting is not None
    _end(fitting)


def test_preparing_for_another_environment_replaces_it(spare: SpareChild) -> None:
    spare.prepare(ENVIRONMENT)
    old = spare.pid
    spare.prepare({"A": "2"})
    assert spare.pid not in {None, old}


def test_one_that_died_is_not_handed_over_and_is_replaced_after_a_pause(clock: Clock) -> None:
    spare = SpareChild(DIES, clock=clock)
    spare.prepare(ENVIRONMENT)
    assert spare._waiting is not None
    spare._waiting.child.wait(30)
    first = spare.pid
    spare.prepare(ENVIRONMENT)
    assert spare.pid is None, "it would die again at once"
    assert spare.take(ENVIRONMENT) is None
    clock.now = 61
    spare.prepare(ENVIRONMENT)
    assert spare.pid not in {None, first}
    spare.close()


def test_closing_ends_it(spare: SpareChild) -> None:
    spare.prepare(ENVIRONMENT)
    waiting = spare._waiting
    assert waiting is not None
    spare.close()
    assert waiting.child.poll() is not None
    assert spare.pid is None


def test_a_command_that_cannot_start_leaves_none(clock: Clock) -> None:
    spare = SpareChild(["/nonexistent/program"], clock=clock)
    spare.prepare(ENVIRONMENT)
    assert spare.take(ENVIRONMENT) is None


def test_a_process_gets_ready_until_it_is_wanted() -> None:
    done: list[int] = []
    get_ready([partial(done.append, step) for step in range(9)], is_wanted=lambda: len(done) == 3)
    assert done == [0, 1, 2]


def test_what_cannot_be_imported_ahead_is_left_to_the_job() -> None:
    done: list[int] = []

    def lacking() -> None:
        raise ImportError

    get_ready([lacking, lambda: done.append(1)], is_wanted=lambda: False)
    assert done == [1]


def test_a_real_child_without_a_job_ends_in_silence() -> None:
    done = subprocess.run(
        child_command(model_types=["bert", "no-such-type"], is_ahead=True),
        input="",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def _end(child: subprocess.Popen[str]) -> None:
    end_child(child)
    close_pipes(child)
