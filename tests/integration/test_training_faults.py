"""Training on a tiny backbone through the recipe: every loss and optimiser, and the faults a run can meet."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from finetune.jobs.failures import NonFiniteLoss, Stopped
from finetune.jobs.hyperparameters import PlanError
from finetune.jobs.link import ChildJob
from finetune.training.loop import _Loop
from finetune.training.memory import OutOfMemory, PassSize, largest_that_fits
from finetune.training.recipe import run_job
from finetune.worker.child import explain
from tests.integration.test_recipe import RecordingLink, _stop_after, backbone_folder, finish, job, rows_file, store

__all__ = ["backbone_folder", "job", "rows_file", "store"]

Build = Callable[..., ChildJob]


def details(result: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = result["evaluation"]["methods"][0]["details"]
    return found


@pytest.mark.parametrize("loss", ["bce", "focal", "contrastive", "triplet", "mnrl", "cosent"])
def test_every_loss_learns(job: Build, loss: str) -> None:
    result = finish(job(method="lora", loss=loss, epochs=6, learning_rate=0.01), RecordingLink())
    history = details(result)["history"]
    assert history[-1]["train_loss"] < history[0]["train_loss"]


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "rmsprop", "adafactor"])
def test_every_optimiser_learns_and_resumes(job: Build, optimizer: str) -> None:
    options: dict[str, Any] = {"method": "full", "optimizer": optimizer, "epochs": 3, "dropout": 0.1}
    whole = finish(job("whole", **options), RecordingLink())
    torch.manual_seed(0)
    with pytest.raises(Stopped):
        run_job(job("cut", **options), RecordingLink(_stop_after(5, Stopped())))
    link = RecordingLink()
    resumed = finish(job("cut", **options), link)
    assert link.of("resumed")
    assert details(resumed)["history"][-1]["train_loss"] < details(resumed)["history"][0]["train_loss"]
    assert resumed["evaluation"]["test"]["loss"] == pytest.approx(whole["evaluation"]["test"]["loss"], abs=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"scheduler": "plateau"},
        {"scheduler": "cyclic"},
        {"gradient_checkpointing": True},
        {"layer_decay": 0.8},
        {"gradient_accumulation": 3, "batch_size": 8},
        {"class_weights": {"good": 3.0}, "loss": "focal"},
    ],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_option_trains(job: Build, options: dict[str, Any], precision: str) -> None:
    assert finish(job(method="full", epochs=1, precision=precision, **options), RecordingLink())


def test_a_step_does_not_depend_on_how_it_is_divided(job: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = details(finish(job("whole", method="full", epochs=2), RecordingLink()))
    monkeypatch.setattr("finetune.training.loop._CPU_TOKENS", 24)
    divided = details(finish(job("divided", method="full", epochs=2), RecordingLink()))
    for one, other in zip(whole["history"], divided["history"], strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-4)


@pytest.mark.parametrize("every", [0.3, 0.4, 1.0])
def test_evaluations_are_evenly_apart_and_end_with_the_last_step(job: Build, every: float) -> None:
    options = {"epochs": 2, "batch_size": 7, "eval_every": every, "early_stopping": {"patience": 100}}
    history = details(finish(job(method="lora", **options), RecordingLink()))["history"]
    epochs = [entry["epoch"] for entry in history]
    assert len(epochs) == -(-2 // every)
    assert epochs[-1] == 2
    gaps = [after - before for before, after in itertools.pairwise(epochs)]
    assert max(gaps[:-1] or gaps) - min(gaps[:-1] or gaps) < 0.2


# Memory


def _failing(times: int, error: Exception) -> Callable[[Any, Any, Any], Any]:
    """`_losses` that fails at its second to `times + 1`th call."""
    original, calls = _Loop._losses, {"n": 0}

    def losses(self: Any, batch: Any, targets: Any) -> Any:
        calls["n"] += 1
        if 2 <= calls["n"] <= times + 1:
            raise error
        return original(self, batch, targets)

    return losses


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory_halves_the_pass_once_and_the_run_ends_the_same(
    job: Build, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    expected = finish(job("whole", method="full", epochs=2), RecordingLink())
    monkeypatch.setattr(_Loop, "_losses", _failing(1, error))
    link = RecordingLink()
    result = finish(job("halved", method="full", epochs=2), link)
    (event,) = [event for event in link.of("data_warning") if event["data"].get("code") == "batch_halved"]
    assert event["data"]["rows"] == 16
    assert result["evaluation"]["test"]["loss"] == pytest.approx(expected["evaluation"]["test"]["loss"], abs=1e-4)


def test_out_of_memory_at_half_the_size_too_ends_the_job_with_advice(
    job: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Loop, "_losses", _failing(2, MemoryError()))
    with pytest.raises(OutOfMemory) as refused:
        run_job(job(method="full", epochs=1), RecordingLink())
    assert refused.value.failure.code == "out_of_memory"
    assert "batch_size" in refused.value.failure.hint


def test_another_error_is_not_taken_for_a_lack_of_memory(job: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Loop, "_losses", _failing(1, RuntimeError("shapes do not fit")))
    with pytest.raises(RuntimeError, match="shapes"):
        run_job(job(method="full", epochs=1), RecordingLink())


def test_the_largest_pass_that_fits_is_found_by_halving() -> None:
    tried: list[int] = []

    def attempt(size: PassSize) -> None:
        tried.append(size.rows)
        if size.rows > 12:
            raise torch.OutOfMemoryError("CUDA out of memory")

    assert largest_that_fits(attempt, PassSize(64)) == PassSize(8)
    assert tried == [64, 32, 16, 8]

    def never(size: PassSize) -> None:
        raise MemoryError

    with pytest.raises(OutOfMemory):
        largest_that_fits(never, PassSize(4))


def test_auto_batch_size_starts_with_what_fits(job: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    original = _Loop._losses

    def losses(self: Any, batch: Any, targets: Any) -> Any:
        sizes.append(len(batch.rows))
        if len(batch.rows) > 10:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, batch, targets)

    original_init = _Loop.__init__

    def init(self: Any, *arguments: Any) -> None:
        original_init(self, *arguments)
        self.plan = self.plan.model_copy(update={"finds_batch_size": True})

    monkeypatch.setattr(_Loop, "__init__", init)
    monkeypatch.setattr(_Loop, "_losses", losses)
    link = RecordingLink()
    assert finish(job(method="full", epochs=1), link)
    assert sizes[:3] == [32, 16, 8] and max(sizes[3:]) == 8
    assert not [event for event in link.of("data_warning") if event["data"].get("code") == "batch_halved"]


# Numbers that are none


def test_a_loss_that_is_not_finite_names_rows_rate_and_precision(job: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    original = _Loop._losses

    def losses(self: Any, batch: Any, targets: Any) -> Any:
        of_rows, of_vectors, plain = original(self, batch, targets)
        broken = torch.zeros_like(of_rows)
        broken[0] = torch.nan
        return of_rows + broken, of_vectors, plain

    monkeypatch.setattr(_Loop, "_losses", losses)
    with pytest.raises(NonFiniteLoss, match=r"row \d+ became infinite or NaN at step 0 .*learning rate.*fp32") as found:
        run_job(job(method="full", epochs=1), RecordingLink())
    assert found.value.failure.code == "non_finite_loss"
    assert "learning_rate" in found.value.failure.hint and "precision" not in found.value.failure.hint


def test_fp16_on_a_cpu_is_refused_with_what_to_use(job: Build) -> None:
    with pytest.raises(PlanError, match="use bf16, fp32 or auto") as refused:
        run_job(job(method="full", precision="fp16"), RecordingLink())
    assert explain(refused.value).code == "invalid_hyperparameters"
