"""A training process killed five times at random steps ends, resumed, with the figures of one that was left alone."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune.jobs.link import ChildJob
from finetune.training.settings import child_environment
from tests.integration.test_recipe import backbone_folder, job, rows_file, store

pytestmark = pytest.mark.slow

__all__ = ["backbone_folder", "job", "rows_file", "store"]

KILLS = 5


class Processes:
    """Training processes, of which one is always importing what the next attempt needs, beside the one that runs."""

    def __init__(self) -> None:
        self.waiting = self._start()

    def take(self) -> subprocess.Popen[str]:
        taken, self.waiting = self.waiting, self._start()
        return taken

    def close(self) -> None:
        self.waiting.kill()
        self.waiting.communicate()

    def _start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "finetune.worker.child", "--ahead", "bert"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            stderr=subprocess.DEVNULL,
            env=child_environment(1) | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    started = Processes()
    yield started
    started.close()


def train(job: ChildJob, child: subprocess.Popen[str], *, kill_after: int | None = None) -> list[dict[str, Any]]:
    """The messages of a training process, which is killed after so many of its checkpoints, in the midst of a step.

    Nothing is synchronised: between the message and the signal it has gone on by as many steps as it could.
    """
    assert child.stdin is not None and child.stdout is not None
    messages, saved = [], 0
    child.stdin.write(job.model_dump_json() + "\n")
    child.stdin.flush()
    for line in child.stdout:
        messages.append(json.loads(line))
        saved += messages[-1].get("type") == "checkpoint_saved"
        if messages[-1]["kind"] == "reserve":
            child.stdin.write(json.dumps({"kind": "reserved", "version": 1}) + "\n")
            child.stdin.flush()
        if kill_after is not None and saved == kill_after:
            os.kill(child.pid, signal.SIGKILL)
            break
    child.stdout.close()
    child.stdin.close()
    child.wait()
    return messages


@pytest.mark.parametrize("method", ["lora", "full"])
def test_five_kills_do_not_change_a_figure(
    job: Callable[..., ChildJob], processes: Processes, tmp_path: Path, method: str
) -> None:
    options: dict[str, Any] = {
        "method": method,
        "epochs": 30,
        "eval_every": 0.5,
        "dropout": 0.1,
        "precision": "bf16",
        "scheduler": "plateau",
        "early_stopping": {"patience": 1000},
    }
    (whole,) = [m for m in train(job("whole", **options), processes.take()) if m["kind"] == "succeeded"]
    draw = random.Random(method)
    attempt = job("attempt-0", **options)
    resumed = []
    for number in range(KILLS):
        messages = train(attempt, processes.take(), kill_after=draw.randint(1, 3))
        assert not [message for message in messages if message["kind"] == "succeeded"], "it ended before it was killed"
        resumed += [message["data"]["step"] for message in messages if message.get("type") == "resumed"]
        folders = (attempt.work_dir, *attempt.earlier_work_dirs)
        attempt = job(f"attempt-{number + 1}", **options).model_copy(update={"earlier_work_dirs": folders})
    messages = train(attempt, processes.take())
    resumed += [message["data"]["step"] for message in messages if message.get("type") == "resumed"]
    assert len(resumed) == KILLS and resumed == sorted(resumed) and resumed[0] > 0
    (last,) = [message for message in messages if message["kind"] == "succeeded"]
    assert_same(last["evaluation"], whole["evaluation"])


def assert_same(found: Any, expected: Any, place: str = "evaluation") -> None:
    """Every figure within 1e-6, but for those of the clock and of the process, and the digests of the weights."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), place
        for key in expected.keys() - {"seconds", "rows_per_second", "peak_mb", "weights"}:
            assert_same(found[key], expected[key], f"{place}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), place
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{place}[{index}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=1e-6), place
    else:
        assert found == expected, place
