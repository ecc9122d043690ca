"""What a training process says to its supervisor, over real pipes."""

from __future__ import annotations

import io
import json
import math
import os

import pytest

from finetune.jobs.failures import Stopped
from finetune.worker.pipe_link import PipeLink


def test_numbers_that_json_does_not_know_are_none() -> None:
    sink = io.StringIO()
    link = PipeLink(io.StringIO(), sink)
    link.event("metrics", "a loss", {"loss": math.nan, "values": [1.0, math.inf], "deep": {"a": (-math.inf, 2)}})
    link.set(best={"value": math.nan})
    link.succeed(manifest={}, evaluation={"r2": math.nan}, was_cancelled=False)
    event, columns, end = [json.loads(line, parse_constant=pytest.fail) for line in sink.getvalue().splitlines()]
    assert event["data"] == {"loss": None, "values": [1.0, None], "deep": {"a": [None, 2]}}
    assert columns["columns"] == {"best": {"value": None}}
    assert end["evaluation"] == {"r2": None}


def test_a_question_waits_for_its_answer_and_ends_with_the_supervisor() -> None:
    (ours, theirs), sink = os.pipe(), io.StringIO()
    with os.fdopen(ours) as source, os.fdopen(theirs, "w") as supervisor:
        link = PipeLink(source, sink)
        supervisor.write(json.dumps({"kind": "reserved", "version": 7}) + "\n")
        supervisor.flush()
        assert link.reserve(kind="head", method="x") == 7
        supervisor.close()
        with pytest.raises(Stopped):
            link.champion()


def test_progress_that_counts_no_steps_is_not_told_more_often_than_the_rest() -> None:
    sink = io.StringIO()
    link = PipeLink(io.StringIO(), sink, progress_every_s=1000)
    for _ in range(5):
        link.progress(percent=3.0)
    assert len(sink.getvalue().splitlines()) == 1
    link.progress(percent=4.0, step=8, total_steps=8)
    assert len(sink.getvalue().splitlines()) == 2
