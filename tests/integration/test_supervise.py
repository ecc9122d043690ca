"""The supervisor over real, tiny processes. It runs in a process of its own, as it takes over signals."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from polyhead.supervise import Times, port_problem, restart_delay_s

READY = """
import http.server, os, pathlib, signal, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.send_header("content-length", "0"); self.end_headers()
    def log_message(self, *_): pass
class Server(http.server.HTTPServer):
    allow_reuse_address = True
signal.signal(signal.SIGTERM, lambda *_: (print("serving: term", flush=True), sys.exit(0)))
print("serving: up", os.getpid(), flush=True)
Server(("127.0.0.1", int(os.environ["PORT"])), Handler).serve_forever()
"""
IDLE = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (print("worker: term", flush=True), sys.exit(0)))
print("worker: up", os.getpid(), flush=True)
while True: time.sleep(0.05)  # not signal.pause(): a signal just before it would be lost
"""
STUBBORN = """
import signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
while True: signal.pause()
"""
DYING = "print('line one'); print('the reason it died'); raise SystemExit(3)"

MAIN = """
import json, os, signal, sys
from pathlib import Path
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it would be ignored, here and in all that is started
from polyhead.supervise import Program, Supervisor, Times
serving, worker, folder, times = json.loads(sys.argv[1])
programs = tuple(
    Program(name, (sys.executable, "-c", code), Path(folder, f"{name}.log"))
    for name, code in (("serving", serving), ("worker", worker))
)
url = f"http://127.0.0.1:{os.environ['PORT']}/readyz"
supervisor = Supervisor(
    programs, url, environment=os.environ, times=Times(**times),
    say=lambda message: print(message, flush=True), greeting=lambda: "READY",
)
sys.exit(supervisor.run())
"""


class Up:
    """A running supervisor and the logs of its two children."""

    def __init__(self, folder: Path, serving: str, worker: str, times: dict[str, float]) -> None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            port = unused.getsockname()[1]
        self.folder = folder
        self.output = folder / "up.log"
        arguments = json.dumps([serving, worker, str(folder), {"poll_s": 0.02, "first_delay_s": 0.05, **times}])
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-c", MAIN, arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, "PORT": str(port)},
                start_new_session=True,
            )

    def said(self) -> str:
        return self.output.read_text()

    def log(self, name: str) -> str:
        path = self.folder / f"{name}.log"
        return path.read_text() if path.exists() else ""

    def pids(self, name: str) -> list[int]:
        return [int(line.split()[-1]) for line in self.log(name).splitlines() if ": up " in line or "child" in line]

    def has_started(self, name: str, times: int) -> bool:
        return len(self.pids(name)) == times

    def until(self, condition: Callable[[], object]) -> None:
        end = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < end, self.said()
            time.sleep(0.01)

    def until_ready(self) -> None:
        self.until(lambda: "READY" in self.said() and self.pids("worker"))

    def ended(self) -> int:
        return self.process.wait(60)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Up]]:
    started: list[Up] = []

    def _start(serving: str = READY, worker: str = IDLE, **times: float) -> Up:
        started.append(Up(tmp_path, serving, worker, times))
        return started[-1]

    yield _start
    for up in started:
        if up.process.poll() is None:
            up.process.terminate()
            up.ended()


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_both_with_sigterm_and_status_0(start: Callable[..., Up], number: signal.Signals) -> None:
    up = start()
    up.until_ready()
    os.killpg(up.process.pid, number)  # as a terminal sends it; the children are in groups of their own
    assert up.ended() == 0
    assert "serving: term" in up.log("serving")
    assert "worker: term" in up.log("worker")
    assert "stopping serving and worker\nstopped" in up.said()


def test_a_child_that_dies_is_started_again(start: Callable[..., Up]) -> None:
    up = start()
    up.until_ready()
    for name in ("worker", "serving"):
        first = up.pids(name)[0]
        os.kill(first, signal.SIGKILL)
        up.until(partial(up.has_started, name, 2))
        assert f"{name}: was ended by SIGKILL; starting it again in 0.05 s" in up.said()
    up.process.terminate()
    assert up.ended() == 0
    assert up.log("worker").count("worker: term") == 1


def test_a_restart_waits_longer_each_time(start: Callable[..., Up]) -> None:
    dies_later = IDLE.replace("while True: time.sleep(0.05)", "time.sleep(0.5); sys.exit(4)")
    up = start(worker=dies_later)
    up.until(lambda: "starting it again in 0.2 s" in up.said() or up.process.poll() is not None)
    if up.process.poll() is None:
        up.process.terminate()
    assert up.ended() in (0, 1)
    assert "worker: ended with status 4" in up.said()


def test_a_child_that_dies_before_ready_shows_its_last_lines(start: Callable[..., Up], tmp_path: Path) -> None:
    (tmp_path / "serving.log").write_text("from an earlier run\n")
    up = start(serving=DYING)
    assert up.ended() == 1
    assert "serving: ended with status 3" in up.said()
    assert "the reason it died" in up.said()
    assert "from an earlier run" not in up.said()
    assert up.log("serving").startswith("from an earlier run\nline one")
    assert not any(is_alive(pid) for pid in up.pids("worker"))


def test_one_that_is_never_ready(start: Callable[..., Up]) -> None:
    up = start(serving=IDLE, ready_s=1.0)
    assert up.ended() == 1
    assert "waiting: the serving process is starting" in up.said()
    assert "not ready after 1 s" in up.said()


def test_a_signal_before_ready_is_a_clean_stop(start: Callable[..., Up]) -> None:
    up = start(serving=IDLE.replace("worker: ", "serving: "))
    up.until(lambda: up.pids("serving") and up.pids("worker"))
    up.process.send_signal(signal.SIGINT)
    assert up.ended() == 0
    assert "READY" not in up.said()


def test_one_that_does_not_stop_is_killed_with_its_children(start: Callable[..., Up]) -> None:
    up = start(worker=STUBBORN, stop_s=0.3)
    up.until_ready()
    up.process.terminate()
    assert up.ended() == 1
    assert "worker: did not stop in time, killed" in up.said()
    up.until(lambda: not is_alive(up.pids("worker")[0]))


def test_a_second_ctrl_c_does_not_wait(start: Callable[..., Up]) -> None:
    up = start(worker=STUBBORN, impatient_s=0.0)
    up.until_ready()
    up.process.send_signal(signal.SIGINT)
    up.until(lambda: "stopping" in up.said())
    up.process.send_signal(signal.SIGINT)
    assert up.ended() == 1


def test_delays_double_up_to_a_bound() -> None:
    assert [restart_delay_s(deaths, Times()) for deaths in range(1, 8)] == [1, 2, 4, 8, 16, 30, 30]
    assert restart_delay_s(10_000, Times()) == 30


def test_a_taken_port_is_seen() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert port_problem("127.0.0.1", port) == "Address already in use"
    assert port_problem("127.0.0.1", port) is None


def test_a_host_that_is_not_ours() -> None:
    assert port_problem("192.0.2.1", 8000) is not None


def test_one_that_refuses_its_settings_says_why_whenever_it_does(start: Callable[..., Up]) -> None:
    told = "POLYHEAD_WORKER_METRICS_PORT: port 9109 cannot be used"
    up = start(worker=f"import sys; print({told!r}, flush=True); sys.exit(2)")
    assert up.ended() == 1
    assert "worker: ended with status 2" in up.said() and told in up.said()
    later = IDLE.replace("while True: time.sleep(0.05)", f"time.sleep(0.3); print({told!r}, flush=True); sys.exit(2)")
    up = start(worker=later)
    up.until(lambda: f"worker: ended with status 2: {told}; starting it again" in up.said() or up.process.poll())
    if up.process.poll() is None:
        up.process.terminate()
    assert up.ended() in (0, 1)
