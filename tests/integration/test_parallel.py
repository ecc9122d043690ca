"""Several processes that train together, on a CPU: the same run as one alone, and every way that one ends."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from finetune.jobs.failures import NonFiniteLoss, ProcessLost, Stopped
from finetune.jobs.link import ChildJob
from finetune.jobs.plan import WorkerProfile
from finetune.training import parallel
from finetune.training.loop import _Loop
from finetune.training.parallel import Ranks, share_of
from finetune.training.recipe import run_job
from model_registry.manifest import ModelManifest
from model_registry.store import FileStore
from tests.integration.test_killed_runs import assert_same
from tests.integration.test_recipe import RecordingLink, _stop_after, backbone_folder, finish, job, rows_file, store
from tests.integration.test_training_faults import details

__all__ = ["backbone_folder", "job", "rows_file", "store"]

Build = Callable[..., ChildJob]


@pytest.fixture(autouse=True)
def on_this_host_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))


@pytest.fixture(scope="module")
def kept() -> Iterator[list[Ranks]]:
    """The other process of this module's quiet runs: it stays for all of them."""
    ranks: list[Ranks] = []
    yield ranks
    for one in ranks:
        one.close()


@pytest.fixture
def pair(job: Build, kept: list[Ranks], monkeypatch: pytest.MonkeyPatch) -> Build:
    """A job of two processes, the second of which outlives it."""

    def keep(plan: Any, work_dir: Path) -> Any:
        if plan.processes == 1:
            return contextlib.nullcontext()
        if not kept:
            kept.append(Ranks(plan, work_dir=work_dir))
        return contextlib.nullcontext(kept[0])

    monkeypatch.setattr("finetune.training.recipe._ranks", keep)
    return _of_two(job)


@pytest.fixture
def two(job: Build, kept: list[Ranks]) -> Build:
    """A job of two processes, the second of which starts and ends with it; a process can be in one group only."""
    for one in kept:
        one.close()
    kept.clear()
    return _of_two(job)


def _of_two(job: Build) -> Build:
    def build(*arguments: Any, processes: int = 2, **options: Any) -> ChildJob:
        worker = WorkerProfile(cpu_threads=processes)  # one thread each
        return job(*arguments, processes=processes, **options).model_copy(update={"worker": worker})

    return build


# The same run


@given(st.lists(st.integers(1, 512), max_size=80), st.integers(1, 9))
def test_shares_hold_every_row_once_and_as_many_tokens(lengths: list[int], processes: int) -> None:
    rows = np.arange(len(lengths))[::-1]
    found = [share_of(np.asarray(lengths), rows, rank=rank, processes=processes) for rank in range(processes)]
    assert sorted(np.concatenate(found).tolist()) == list(range(len(lengths)))
    tokens = [sum(lengths[row] for row in share) for share in found]
    assert max(tokens) - min(tokens) <= max(lengths, default=0)
    assert processes > 1 or found[0].tolist() == rows.tolist()


OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora"},
    # Uneven shares in every step, passes within a step, and rows that weigh differently.
    "full": {
        "method": "full",
        "optimizer": "sgd",
        "batch_size": 7,
        "gradient_accumulation": 3,
        "unfreeze_layers": 1,
        "loss": "focal",
        "class_weights": {"good": 3.0},
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("case", OPTIONS)
def test_two_processes_train_what_one_does(
    pair: Build, store: FileStore, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = OPTIONS[case] | {"epochs": 3, "restore_best": False}
    alone = finish(pair("alone", processes=1, **options), RecordingLink())
    expected = weights(store, alone)
    shares: list[int] = []
    original = _Loop._share

    def share(self: Any, step: int) -> Any:
        found = original(self, step)
        shares.append(found[2])
        return found

    monkeypatch.setattr(_Loop, "_share", share)
    together = finish(pair("together", **options), RecordingLink())
    assert sum(shares) < 0.6 * 3 * together["evaluation"]["rows"]["train"], "the other process computed nothing"
    assert (details(alone)["processes"], details(together)["processes"]) == (1, 2)
    assert len(set(details(together)["seeds"])) == 2
    for one, other in zip(details(alone)["history"], details(together)["history"], strict=True):
        assert other["train_loss"] == pytest.approx(one["train_loss"], abs=1e-5)
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-5)
    found = weights(store, together)
    assert any(np.abs(values).max() > 1e-3 for name, values in found.items() if "lora_B" in name or case == "full")
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_a_last_step_of_one_row_is_taken_by_all(pair: Build, store: FileStore) -> None:
    rows = finish(pair("counted", processes=1, method="baseline"), RecordingLink())["evaluation"]["rows"]["train"]
    options = {"method": "full", "epochs": 2, "batch_size": rows - 1, "restore_best": False}
    expected = weights(store, finish(pair("alone", processes=1, **options), RecordingLink()))
    together = finish(pair("together", **options), RecordingLink())
    assert details(together)["steps"] == 4
    found = weights(store, together)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], atol=1e-5, err_msg=name)


def weights(store: FileStore, result: dict[str, Any]) -> dict[str, npt.NDArray[Any]]:
    folder = store.local_path(ModelManifest.model_validate(result["manifest"]).prefix)
    return {
        f"{path.relative_to(folder)}:{name}": values
        for path in sorted(folder.rglob("*.safetensors"))
        for name, values in load_file(path).items()
    }


@pytest.mark.slow
def test_a_run_that_is_paused_ends_as_if_it_had_not_been(pair: Build) -> None:
    options: dict[str, Any] = {"method": "lora", "epochs": 3, "dropout": 0.2}
    whole = finish(pair("whole", **options), RecordingLink())
    with pytest.raises(Stopped):
        finish(pair("cut", **options), RecordingLink(_stop_after(5, Stopped())))
    link = RecordingLink()
    resumed = finish(pair("cut", **options), link)
    assert link.of("resumed")
    assert_same(resumed["evaluation"], whole["evaluation"])


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(pair: Build) -> None:
    options: dict[str, Any] = {"method": "full", "epochs": 3}
    whole = finish(pair("whole", processes=1, **options), RecordingLink())
    with pytest.raises(Stopped):
        finish(pair("cut", **options), RecordingLink(_stop_after(5, Stopped())))
    resumed = finish(pair("cut", processes=1, **options), RecordingLink())
    assert resumed["evaluation"]["test"]["loss"] == pytest.approx(whole["evaluation"]["test"]["loss"], abs=1e-5)


@pytest.mark.slow
def test_a_search_keeps_its_processes(pair: Build, kept: list[Ranks]) -> None:
    finish(pair("first", method="lora", epochs=1), RecordingLink())
    before = [other.pid for other in kept[0]._others]
    result = finish(pair("search", method="lora", epochs=1, trials=2), RecordingLink())
    assert len(details(result)["search"]["trials"]) == 2
    assert [other.pid for other in kept[0]._others] == before


# One of them ends, or cannot go on

_FAULTY = """
import os, signal, sys, torch
from finetune.training import rank
from finetune.training.loop import _Loop

original, passes = _Loop._losses, []

def losses(self, batch, targets):
    passes.append(len(batch.rows))
    of_rows, of_vectors, plain = original(self, batch, targets)
    {fault}
    return of_rows, of_vectors, plain

_Loop._losses = losses
rank.main(int(sys.argv[1]))
"""


@pytest.fixture
def follower_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Followers that run a statement in each pass."""

    def start(fault: str) -> None:
        script = tmp_path / "faulty_rank.py"
        script.write_text(_FAULTY.format(fault=fault))
        monkeypatch.setattr(parallel, "_COMMAND", (sys.executable, str(script)))

    return start


@pytest.mark.slow
def test_a_shortage_of_memory_in_one_halves_the_passes_of_all(
    two: Build, follower_with: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"method": "full", "epochs": 1, "batch_size": 32}
    expected = finish(two("alone", processes=1, **options), RecordingLink())
    sizes: list[int] = []
    original = _Loop._share

    def share(self: Any, step: int) -> Any:
        sizes.append(self.size.rows)
        return original(self, step)

    monkeypatch.setattr(_Loop, "_share", share)
    follower_with('if len(passes) == 2: raise RuntimeError("DefaultCPUAllocator: can\'t allocate memory")')
    link = RecordingLink()
    result = finish(two("halved", **options), link)
    assert sizes[:3] == [32, 32, 16] and set(sizes[3:]) == {16}
    assert [event["data"].get("code") for event in link.of("data_warning")].count("batch_halved") == 1
    assert result["evaluation"]["test"]["loss"] == pytest.approx(expected["evaluation"]["test"]["loss"], abs=1e-5)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_in_one_ends_all_and_names_the_row(
    two: Build, follower_with: Callable[[str], None]
) -> None:
    follower_with("if len(passes) == 3: of_rows = of_rows + torch.tensor([torch.nan] + [0.0] * (len(of_rows) - 1))")
    with pytest.raises(NonFiniteLoss, match=r"the loss of row \d+ became infinite or NaN at step 2 "):
        run_job(two(method="full", epochs=1), RecordingLink())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("if len(passes) == 3: os.kill(os.getpid(), signal.SIGKILL)", r"1 of 2 ended \(SIGKILL.*at step 2"),
        ("if len(passes) == 3: raise ValueError('no')", r"1 of 2 failed \(ValueError: no\) at step 2"),
    ],
)
def test_one_that_dies_in_a_step_fails_the_job(
    two: Build, follower_with: Callable[[str], None], fault: str, said: str
) -> None:
    follower_with(fault)
    with pytest.raises(ProcessLost, match=said) as lost:
        run_job(two(method="lora", epochs=1), RecordingLink())
    assert lost.value.failure.code == "process_lost" and lost.value.failure.retryable


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "said"), [(signal.SIGKILL, r"ended \(SIGKILL"), (signal.SIGSTOP, "gives no sign of life")]
)
def test_one_that_dies_or_hangs_between_steps_fails_the_job(
    two: Build, number: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Ranks] = []
    original = Ranks.__init__

    def init(self: Ranks, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **options)
        started.append(self)

    def strike(events: list[dict[str, Any]]) -> None:
        if any(event["type"] == "best_updated" for event in events):
            os.kill(started[0]._others[0].pid, number)

    monkeypatch.setattr(parallel, "_EXCHANGE_S", 10.0)
    monkeypatch.setattr(Ranks, "__init__", init)
    with pytest.raises(ProcessLost, match=said):
        run_job(two(method="lora", epochs=2), RecordingLink(strike))
    assert not started[0]._others, "they are gone at the end"


@pytest.mark.slow
def test_one_that_cannot_start_fails_the_job(two: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "_COMMAND", (sys.executable, "-c", "raise SystemExit(3)"))
    with pytest.raises(ProcessLost, match=r"training process 1 of 2 ended \(exit status 3\)"):
        run_job(two(method="lora", epochs=1), RecordingLink())
