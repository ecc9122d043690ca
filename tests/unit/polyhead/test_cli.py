"""The command line: what a command sends, prints and exits with."""

from __future__ import annotations

import csv
import io
import os
import shlex
import socket
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from finetune.worker.settings import WorkerSettings
from polyhead import __version__
from polyhead.cli import SAMPLE, app, child_environment, greeting, worker_metrics
from tests.unit.polyhead.conftest import Service

CHANGE = {"model": "reviews", "alias": "champion", "from_version": 1, "version": 2}


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("POLYHEAD_")]:
        monkeypatch.delenv(name)


def run(service: Service | None, *arguments: str | Path) -> Result:
    variables = {"POLYHEAD_URL": service.url} if service else {}
    return CliRunner(env=variables).invoke(app, [str(argument) for argument in arguments])


def job(**changes: Any) -> dict[str, Any]:
    values = {"id": "ft_1", "status": "running", "phase": "training", "progress": {"percent": 41.7}, "result": None}
    return values | {"error": None, "register_as": "reviews"} | changes


def test_predict(service: Service) -> None:
    rows = [{"label": "good", "score": 0.98765}, {"label": None, "score": 0.4}]
    service.on("POST /predict", (200, {"predictions": rows}))
    result = run(service, "predict", "reviews", "fine", "so\tso")
    assert result.stdout == "label\tscore\ttext\ngood\t0.9877\tfine\n(none)\t0.4000\tso so\n"
    assert service.asked[0].json["inputs"] == ["fine", "so\tso"]


def test_predict_with_several_labels_and_with_a_value(service: Service) -> None:
    scores = [{"label": "sport", "score": 0.9}, {"label": "money", "score": 0.75}, {"label": "art", "score": 0.1}]
    rows = [{"labels": ["sport", "money"], "scores": scores}, {"labels": [], "scores": scores}]
    service.on("POST /predict", (200, {"predictions": rows}), (200, {"predictions": [{"value": 1234567.8}]}))
    result = run(service, "predict", "topics", "fine", "so")
    assert result.stdout == "label\tscore\ttext\nsport, money\t0.9000, 0.7500\tfine\n(none)\t\tso\n"
    assert run(service, "predict", "price", "x").stdout == "value\ttext\n1234568\tx\n"


def test_a_label_cannot_drive_the_terminal(service: Service) -> None:
    service.on("POST /predict", (200, {"predictions": [{"label": "\x1b[2Jgood", "score": 1}]}))
    assert "\x1b" not in run(service, "predict", "reviews", "x").stdout


def test_a_refusal_shows_detail_code_and_places(service: Service) -> None:
    errors = [{"loc": ["body", "inputs"], "message": "Field required"}]
    service.on("POST /predict", (422, {"code": "invalid_request", "detail": "It is not valid.", "errors": errors}))
    result = run(service, "predict", "reviews", "x")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "error: It is not valid. (invalid_request)\n  body.inputs: Field required\n"


def test_nobody_there() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        result = run(None, "models", "--url", f"http://127.0.0.1:{unused.getsockname()[1]}")
    assert result.exit_code == 1
    assert "cannot reach" in result.stderr and "polyhead up" in result.stderr


def test_upload_prints_the_id_alone_on_stdout(service: Service, tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("text,label\nx,y\n")
    ready = {"id": "ds_1", "status": "ready", "rows": 1, "columns": [{"name": "text"}, {"name": "label"}]}
    service.on("POST /datasets", (201, ready))
    result = run(service, "upload", file)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "ds_1\n", "1 rows; columns: text, label\n")


def test_upload_of_what_cannot_be_used(service: Service, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x")
    finding = {"message": "row 1 has 1 field", "rows": [1, 2], "fix": "give every row as many"}
    service.on("POST /datasets", (201, {"id": "ds_1", "status": "invalid", "errors": [finding]}))
    result = run(service, "upload", tmp_path / "a.csv")
    assert result.exit_code == 1
    assert "  row 1 has 1 field (rows 1, 2); give every row as many\n" in result.stderr


def test_finetune_prints_the_id(service: Service) -> None:
    service.on("POST /finetune", (202, job()))
    result = run(
        service,
        "finetune",
        "ds_1",
        "--register-as",
        "reviews",
        "--test-dataset",
        "ds_2",
        "--label-column",
        "y",
        "--task",
        "text-multi-label",
    )
    assert result.stdout == "ft_1\n"
    assert service.asked[0].json == {
        "dataset": "ds_1",
        "register_as": "reviews",
        "test_dataset": "ds_2",
        "task": "text-multi-label",
        "columns": {"label": "y"},
        "hyperparameters": {"method": "auto"},
    }


def test_finetune_watch_shows_events_and_the_result(service: Service) -> None:
    event = {"seq": 1, "type": "phase_changed", "message": "training"}
    service.on("POST /finetune", (202, job()))
    service.on("GET /finetune/ft_1", (200, job(status="succeeded", result={"name": "reviews", "version": 2})))
    service.on("GET /finetune/ft_1/events", (200, {"data": [event], "has_more": False}))
    result = run(service, "finetune", "ds_1", "--register-as", "reviews", "--watch")
    assert (result.exit_code, result.stdout) == (0, "ft_1\nphase_changed: training\nregistered reviews:2\n")


def test_finetune_watch_ends_with_1_when_the_job_fails(service: Service) -> None:
    error = {"code": "out_of_memory", "message": "no memory left", "hint": "use a smaller batch"}
    service.on("POST /finetune", (202, job()))
    service.on("GET /finetune/ft_1", (200, job(status="failed", error=error)))
    service.on("GET /finetune/ft_1/events", (200, {"data": [], "has_more": False}))
    result = run(service, "finetune", "ds_1", "--register-as", "reviews", "--watch")
    assert result.exit_code == 1
    assert result.stderr == "error: failed: no memory left use a smaller batch (out_of_memory)\n"


def test_jobs(service: Service) -> None:
    done = job(id="ft_0", status="succeeded", result={"name": "reviews", "version": 1})
    service.on("GET /finetune", (200, {"data": [job(), done], "has_more": False}))
    assert run(service, "jobs").stdout.splitlines()[1:] == [
        "ft_1\trunning\ttraining\t42 %\t→ reviews\t",
        "ft_0\tsucceeded\t\t\treviews:1\t",
    ]


def test_models(service: Service) -> None:
    backbone: dict[str, Any] = {
        "id": "minilm",
        "version": None,
        "aliases": {},
        "state": "ready",
        "parent": None,
        "labels": [],
    }
    model = {"id": "reviews", "version": 2, "aliases": {"champion": 2}, "state": "ready", "labels": ["bad", "good"]}
    service.on("GET /models", (200, {"data": [backbone, model]}))
    assert run(service, "models").stdout.splitlines()[1:] == [
        "minilm\t\t\tready\t\t",
        "reviews\t2\tchampion=2\tready\t\tbad, good",
    ]


def test_promote_names_the_version_it_saw(service: Service) -> None:
    service.on("GET /models/reviews", (200, {"aliases": {"champion": 1}}))
    service.on("PUT /models/reviews/aliases/champion", (200, CHANGE))
    assert run(service, "promote", "reviews", "2", "--reason", "better").stdout == "reviews@champion: 1 → 2\n"
    assert service.asked[1].json == {"version": 2, "expected_version": 1, "reason": "better"}


def test_rollback(service: Service) -> None:
    service.on("POST /models/reviews/rollback", (200, CHANGE | {"from_version": 2, "version": 1}))
    assert run(service, "rollback", "reviews").stdout == "reviews@champion: 2 → 1\n"


def test_a_promotion_that_is_not_served_yet_says_why(service: Service) -> None:
    service.on("GET /models/reviews", (200, {"aliases": {"champion": 1}}))
    pending = {"object": "alias.pending", "change": CHANGE, "wanted": 2, "serving": 1, "reason": "the disk is away"}
    service.on("PUT /models/reviews/aliases/champion", (202, pending))
    told = run(service, "promote", "reviews", "2")
    assert (told.exit_code, told.stdout) == (0, "reviews@champion: 1 → 2\n")
    assert told.stderr == "not served yet, version 1 answers meanwhile: the disk is away\n"


def test_version() -> None:
    assert run(None, "--version").stdout == f"{__version__}\n"


# up


def test_up_refuses_a_taken_port(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = run(None, "up", "--port", str(taken.getsockname()[1]), "--data-dir", tmp_path / "data")
    assert result.exit_code == 1
    assert "cannot be used: Address already in use. Choose another with --port." in result.stderr
    assert not (tmp_path / "data").exists()


def test_up_refuses_a_data_folder_it_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = str(unused.getsockname()[1])
    result = run(None, "up", "--port", port, "--data-dir", tmp_path / "file" / "data")
    assert result.exit_code == 1
    assert "the data folder cannot be used" in result.stderr


def test_the_processes_get_the_options_and_keep_what_was_set() -> None:
    given = {"POLYHEAD_PORT": "1", "POLYHEAD_DRAIN_DELAY_S": "7", "HF_HUB_OFFLINE": "0", "PATH": "/bin"}
    assert child_environment(given, port=8001, data_dir=Path("/d")) == {
        "POLYHEAD_PORT": "8001",
        "POLYHEAD_DATA_DIR": "/d",
        "POLYHEAD_DRAIN_DELAY_S": "7",
        "HF_HUB_OFFLINE": "0",
        "PATH": "/bin",
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
    }
    assert child_environment({}, port=8001, data_dir=Path("/d"))["POLYHEAD_DRAIN_DELAY_S"] == "0"


@pytest.mark.parametrize("has_keys", [False, True])
def test_the_greeting_has_three_commands_a_shell_can_read(has_keys: bool) -> None:
    text = greeting("http://127.0.0.1:8000", Path("/a folder/sample.csv"), backbone="minilm", has_keys=has_keys)
    commands = [shlex.split(line) for line in text.splitlines() if line.startswith("    curl")]
    assert len(commands) == 3
    assert 'file=@"/a folder/sample.csv"' in commands[1]
    assert all(("Authorization: Bearer $POLYHEAD_API_KEY" in command) is has_keys for command in commands)


def test_the_sample_is_labelled_evenly() -> None:
    rows = list(csv.DictReader(io.StringIO(SAMPLE)))
    assert [sum(row["label"] == label for row in rows) for label in ("good", "bad")] == [12, 12]
    assert all(row["text"] for row in rows)


def test_up_names_the_setting_where_the_workers_port_is_taken(tmp_path: Path) -> None:
    with socket.socket() as other, socket.socket() as free:
        other.bind(("127.0.0.1", 0))
        other.listen()
        free.bind(("127.0.0.1", 0))
        taken, port = other.getsockname()[1], free.getsockname()[1]
        free.close()
        variables = {"POLYHEAD_WORKER_METRICS_PORT": str(taken)}
        result = CliRunner(env=variables).invoke(app, ["up", "--port", str(port), "--data-dir", str(tmp_path / "data")])
    assert result.exit_code == 1
    assert "POLYHEAD_WORKER_METRICS_PORT" in result.stderr and str(taken) in result.stderr
    assert not (tmp_path / "data").exists(), "nothing was started"


def test_the_workers_port_is_the_one_of_its_settings() -> None:
    assert worker_metrics({}) == ("127.0.0.1", WorkerSettings.model_fields["worker_metrics_port"].default)
    assert worker_metrics({"POLYHEAD_WORKER_METRICS_PORT": "0"})[1] == 0
    assert worker_metrics({"POLYHEAD_WORKER_METRICS_PORT": "many"})[1] == 0, "the worker says what is wrong"
