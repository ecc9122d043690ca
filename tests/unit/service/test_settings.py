from __future__ import annotations

import importlib.metadata
import json
import socket
from typing import Any

import pytest

from finetune.__main__ import _serve
from finetune.worker import settings as worker
from finetune.worker.metrics import WorkerMetrics
from model_registry.settings import RETIRED, retired_settings
from service import settings as serving
from service.settings import load_settings


def settings_of(monkeypatch: pytest.MonkeyPatch, **values: str) -> object:
    environment = {f"POLYHEAD_{name}": value for name, value in values.items()}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return load_settings(environment)


def test_defaults_bind_to_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings_of(monkeypatch).host == "127.0.0.1"  # type: ignore[attr-defined]


def test_all_errors_are_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as refused:
        settings_of(monkeypatch, PORTT="1", PORT="-1", MAX_BATCH_TOKENS="x")
    for name in ("POLYHEAD_PORTT: unknown", "POLYHEAD_PORT:", "POLYHEAD_MAX_BATCH_TOKENS:"):
        assert name in str(refused.value)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_a_reachable_address_needs_keys(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    with pytest.raises(SystemExit, match="api_keys must be set"):
        settings_of(monkeypatch, HOST=host)


def test_keys_open_the_network_and_stay_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = json.dumps([{"name": "k", "sha256": "a" * 64, "scopes": ["predict"]}])
    settings = settings_of(monkeypatch, HOST="0.0.0.0", API_KEYS=keys)
    shown = json.dumps(settings.public())  # type: ignore[attr-defined]
    assert "a" * 64 not in shown
    assert json.loads(shown)["api_keys"] == 1


def test_a_retired_setting_is_warned_about_and_never_refused() -> None:
    environment = {f"POLYHEAD_{name}": "0.8" for name in RETIRED}
    serving.load_settings(environment)
    worker.load_worker_settings(environment)
    for name, warning in zip(RETIRED, retired_settings(environment | {"POLYHEAD_PORT": "1"}), strict=True):
        assert warning.startswith(f"POLYHEAD_{name} is retired and ignored; ")
    assert retired_settings({f"POLYHEAD_{name}": "" for name in RETIRED}) == []


def test_a_retired_setting_is_forgotten_when_its_time_is_over() -> None:
    def numbers(version: str) -> list[int]:
        return [int(part) for part in version.split(".")]

    now = numbers(importlib.metadata.version("polyhead"))
    current = {*serving.ServingSettings.model_fields, *worker.WorkerSettings.model_fields}
    for name, retired in RETIRED.items():
        assert numbers(retired.unknown_from) > now, f"{name}: delete its row, also in docs/settings.md"
        assert name.lower() not in current


def test_an_empty_variable_is_one_that_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    # As a path it would be the working folder.
    assert settings_of(monkeypatch, IMPORT_ROOT="", BATCH_LOG="").import_root is None  # type: ignore[attr-defined]


def test_the_worker_s_names_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    serving_names = {name.upper() for name in serving.ServingSettings.model_fields}
    worker_names = {name.upper() for name in worker.WorkerSettings.model_fields}
    assert worker_names | serving_names == serving_names | serving.FOREIGN - {"URL", "API_KEY"}
    assert worker_names | serving_names == worker_names | worker.FOREIGN - {"URL", "API_KEY"}
    worker.load_worker_settings({f"POLYHEAD_{name}": "" for name in serving_names | worker_names})
    with pytest.raises(SystemExit, match="POLYHEAD_LEASE: unknown"):
        worker.load_worker_settings({"POLYHEAD_LEASE": "5"})


@pytest.mark.parametrize("load", [serving.load_settings, worker.load_worker_settings])
@pytest.mark.parametrize(
    ("name", "value", "told"),
    [("BACKBONES", '{"tiny": ', "it must be JSON"), ("BACKBONES", "[1]", ""), ("DATABASE_TIMEOUT_S", "soon", "")],
)
def test_a_setting_that_cannot_be_read_is_one_clear_line_and_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], load: Any, name: str, value: str, told: str
) -> None:
    monkeypatch.setenv(f"POLYHEAD_{name}", value)
    with pytest.raises(SystemExit) as refused:
        load({f"POLYHEAD_{name}": value})
    (line,) = capsys.readouterr().err.splitlines()
    assert f"POLYHEAD_{name}" in line and told in line
    assert refused.value.code == 2
    assert "Traceback" not in line and "EnvSettingsSource" not in line


def test_contradicting_settings_are_told_in_our_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYHEAD_LEASE_S", "10")
    with pytest.raises(SystemExit, match="heartbeat_s must be at most half") as refused:
        worker.load_worker_settings({"POLYHEAD_LEASE_S": "10"})
    assert "Value error" not in str(refused.value)


def test_a_worker_whose_metrics_port_is_taken_names_the_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        settings = worker.WorkerSettings(worker_metrics_port=port)
        with pytest.raises(SystemExit) as refused:
            _serve(WorkerMetrics(), settings)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("POLYHEAD_WORKER_METRICS_PORT: ") and str(port) in line and "in use" in line
    assert refused.value.code == 2
    _serve(WorkerMetrics(), worker.WorkerSettings(worker_metrics_port=0))()
