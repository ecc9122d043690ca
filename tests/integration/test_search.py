"""A search inside a job, on a tiny backbone: what wins, what is pruned, and what a kill does to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("optuna", reason="needs the extra finetune")

from finetune.jobs.failures import RunError, Stopped
from finetune.training.methods import METHODS
from finetune.training.recipe import run_job
from model_registry.store import FileStore
from modeling.backbone import ingest
from modeling.testing import write_tiny_checkpoint
from tests.support.registering import Record, Workshop

WORDS = {"up": ["great", "superb"], "down": ["bad", "awful"]}
SPACE = {"learning_rate": [1e-6, 3e-3], "batch_size": [16, 32]}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> tuple[FileStore, Path]:
    folder = tmp_path_factory.mktemp("shared")
    store = FileStore(folder / "store")
    return store, ingest(store, write_tiny_checkpoint(folder / "tiny"), name="tiny", source="file:tiny").folder


@pytest.fixture
def shop(backbone: tuple[FileStore, Path], tmp_path: Path) -> Workshop:
    return Workshop(*backbone, tmp_path)


def searched(shop: Workshop, record: Record | None = None, **options: Any) -> tuple[dict[str, Any], Record]:
    train = shop.dataset(WORDS, {"up": 60, "down": 60}, seed=1)
    test = shop.dataset(WORDS, {"up": 30, "down": 30}, seed=2)
    plan: dict[str, Any] = {"method": "lora", "epochs": 1, "trials": 3, "space": SPACE, "pruner": "none"}
    record = record or Record()
    run_job(shop.job(train, test, **(plan | options)), record)
    return record.result["evaluation"], record


def trials_of(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    trials: list[dict[str, Any]] = evaluation["methods"][0]["details"]["search"]["trials"]
    return trials


def told(record: Record) -> list[dict[str, Any]]:
    return [event["data"]["trial"] for event in record.of("metrics") if "trial" in event["data"]]


def test_the_best_trial_is_registered_with_its_plan_and_all_are_told(shop: Workshop) -> None:
    evaluation, record = searched(shop)
    trials = trials_of(evaluation)
    best = evaluation["methods"][0]["details"]["search"]["best"]
    assert [trial["number"] for trial in trials] == [0, 1, 2]
    assert trials[best]["value"] == max(trial["value"] for trial in trials)
    assert trials[best]["value"] == pytest.approx(evaluation["validation"]["macro_f1"])
    assert [trial["number"] for trial in told(record)] == [0, 1, 2]
    version = shop.store.local_path("models/default/m/1")
    plan = json.loads((version / "train" / "params.json").read_text())
    assert plan["methods"][0]["learning_rate"] == trials[best]["params"]["learning_rate"]
    assert plan["trials"] == 3 and plan["methods"][0]["head_learning_rate"] == 1e-3


def test_without_a_space_the_first_trial_is_the_job_without_a_search(shop: Workshop) -> None:
    plain, _ = searched(shop, work="plain", trials=0, space={})
    found, _ = searched(shop, trials=2, space={})
    first = trials_of(found)[0]
    assert first["params"]["learning_rate"] == pytest.approx(5e-4) and first["params"]["lora.r"] == 16
    assert first["value"] == pytest.approx(plain["validation"]["macro_f1"])


def test_asha_ends_weak_trials_at_their_first_evaluations(shop: Workshop) -> None:
    evaluation, _ = searched(shop, trials=6, pruner="asha", epochs=2)
    trials = trials_of(evaluation)
    pruned = [trial for trial in trials if trial["state"] == "pruned"]
    longest = max(len(trial["reports"]) for trial in trials)
    assert pruned and all(len(trial["reports"]) < longest for trial in pruned)
    best = evaluation["methods"][0]["details"]["search"]["best"]
    assert trials[best]["state"] == "complete"


@pytest.mark.parametrize("checks", [2, 6])
def test_after_a_kill_no_finished_trial_is_repeated_and_the_end_is_the_same(shop: Workshop, checks: int) -> None:
    whole, _ = searched(shop, work="whole", trials=3)

    calls = {"left": checks}

    def stop(_: list[dict[str, Any]]) -> None:
        calls["left"] -= 1
        if calls["left"] < 0:
            raise Stopped

    cut = Record(check=stop)
    with pytest.raises(Stopped):
        searched(shop, cut, work="one", trials=3)
    finished = [trial["number"] for trial in told(cut)]
    assert (checks > 4) == bool(finished)
    resumed, record = searched(shop, work="two", earlier=("one",), trials=3)
    assert [trial["number"] for trial in told(record)] == [number for number in range(3) if number not in finished]
    assert bool(finished) == any("search goes on" in event["message"] for event in record.of("resumed"))

    def kept(evaluation: dict[str, Any]) -> list[tuple[Any, ...]]:
        return [(trial["params"], pytest.approx(trial["value"])) for trial in trials_of(evaluation)]

    assert kept(resumed) == kept(whole)
    assert resumed["test"]["loss"] == pytest.approx(whole["test"]["loss"], abs=1e-5)


def test_only_the_best_trial_keeps_its_folder(shop: Workshop) -> None:
    evaluation, _ = searched(shop)
    best = evaluation["methods"][0]["details"]["search"]["best"]
    folders = [path.name for path in (shop.folder / "work" / "trials").iterdir()]
    assert folders == [f"{best:03d}"]


def test_a_trial_that_diverges_is_noted_and_the_search_goes_on(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    _diverge(monkeypatch, numbers={0, 2})
    evaluation, _ = searched(shop, trials=3)
    assert [trial["state"] for trial in trials_of(evaluation)] == ["failed", "complete", "failed"]
    assert "NaN" in trials_of(evaluation)[0]["reason"]


def test_a_search_in_which_every_trial_diverges_fails_with_advice(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    _diverge(monkeypatch, numbers={0, 1})
    with pytest.raises(RunError) as error:
        searched(shop, trials=2)
    assert error.value.failure.code == "search_failed"
    assert "NaN" in str(error.value) and "narrow the space" in error.value.failure.hint


def _diverge(monkeypatch: pytest.MonkeyPatch, *, numbers: set[int]) -> None:
    from finetune.jobs.failures import NonFiniteLoss

    real, count = METHODS["lora"], iter(range(100))

    def train(run: Any) -> Any:
        if next(count) in numbers:
            raise NonFiniteLoss(3)
        return real(run)

    monkeypatch.setitem(METHODS, "lora", train)


def test_the_budget_ends_the_search_with_what_there_is(shop: Workshop) -> None:
    evaluation, _ = searched(shop, trials=500, max_seconds=4)
    assert 1 <= len(trials_of(evaluation)) < 500


def test_without_optuna_the_job_says_what_to_install(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(RunError) as error:
        searched(shop)
    assert error.value.failure.code == "search_unavailable"
    assert "polyhead[finetune]" in error.value.failure.hint
