"""What the end of a process tells about its cause."""

from __future__ import annotations

import signal
import tempfile

import pytest

from modeling.child_process import _failure

BACKTRACE = b"\n".join(b"  %d: some::very::long::name::of::a::frame" % number for number in range(500))


@pytest.mark.parametrize(
    ("code", "said", "cause"),
    [
        (-signal.SIGABRT, b"memory allocation of 4294967296 bytes failed\nstack backtrace:\n" + BACKTRACE, "memory"),
        (1, b"Traceback (most recent call last):\n\nMemoryError\n", "memory"),
        (-signal.SIGKILL, b"", "memory"),
        (-signal.SIGXCPU, b"", "time"),
        (-signal.SIGSEGV, b"", "crash"),
        (1, b"Traceback (most recent call last):\nRuntimeError: odd\n", "crash"),
    ],
)
def test_the_limit_that_ended_a_process_is_told(code: int, said: bytes, cause: str) -> None:
    with tempfile.TemporaryFile() as errors:
        errors.write(said)
        found = _failure(code, errors)
    assert found.cause == cause
    assert len(found.said) <= 4000 and found.said == said.decode()[-4000:]
