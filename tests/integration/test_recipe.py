"""The whole recipe in this process on a tiny backbone: what it registers, and how it ends when it is disturbed."""

from __future__ import annotations

import dataclasses
import errno
import json
import random
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from finetune.data.check import ROWS_FILE, write_checked
from finetune.jobs.failures import Cancelled, DatasetInvalid, NonFiniteLoss, Stopped
from finetune.jobs.link import ChildJob, DatasetInput, EmbeddingInput
from finetune.jobs.plan import WorkerProfile
from finetune.jobs.records import JobSpec
from finetune.training import embedding
from finetune.training.methods import METHODS
from finetune.training.recipe import run_job
from finetune.training.run_context import Run
from model_registry.manifest import MANIFEST_NAME, ModelManifest
from model_registry.store import FileStore
from modeling.assemble import check_golden, read_version
from modeling.backbone import ingest
from modeling.engines.protocol import EngineBatch
from modeling.engines.torch import TorchEngine
from modeling.inputs import single
from modeling.inputs.text import TextPreprocessor
from modeling.testing import write_tiny_checkpoint

GOOD, BAD = ["good", "great", "very good"], ["bad", "dull", "not good"]


class RecordingLink:
    """A `Link` that keeps what it is told. `interrupt(events)` may raise at any check."""

    def __init__(self, interrupt: Callable[[list[dict[str, Any]]], None] | None = None) -> None:
        self.events: list[dict[str, Any]] = []
        self.columns: dict[str, Any] = {}
        self.result: dict[str, Any] | None = None
        self.standing: dict[str, Any] | None = None
        self._interrupt = interrupt

    def event(self, type_: str, message: str, data: Mapping[str, Any] | None = None, *, level: str = "info") -> None:
        self.events.append({"type": type_, "message": message, "data": dict(data or {}), "level": level})

    def phase(self, phase: str) -> None:
        self.event("phase_changed", phase)

    def progress(self, **values: Any) -> None:
        self.columns["progress"] = values

    def set(self, **columns: Any) -> None:
        self.columns |= columns

    def check_cancelled(self) -> None:
        if self._interrupt is not None:
            self._interrupt(self.events)

    def reserve(self, *, kind: str, method: str) -> int:
        return 1

    def champion(self) -> dict[str, Any] | None:
        return self.standing

    def succeed(self, *, manifest: Mapping[str, Any], evaluation: Mapping[str, Any], was_cancelled: bool) -> None:
        self.result = {"manifest": manifest, "evaluation": evaluation, "was_cancelled": was_cancelled}

    def of(self, type_: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["type"] == type_]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FileStore:
    return FileStore(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def backbone_folder(store: FileStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkpoint = write_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny")
    return ingest(store, checkpoint, name="tiny", source="file:tiny").folder


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    draw = random.Random(0)
    with (folder / "raw").open("w") as file:
        for number in range(160):
            is_good = number % 2 == 0
            words = [
                draw.choice(GOOD if is_good else BAD),
                *draw.sample("film plot actor movie story it was".split(), 4),
            ]
            draw.shuffle(words)
            text = f"{' '.join(words)} {chr(97 + number % 26)}{number}"
            file.write(json.dumps({"text": text, "label": "good" if is_good else "bad"}) + "\n")
    report = write_checked(folder / "raw", "jsonl", folder)
    assert report.is_valid
    return folder / ROWS_FILE


@pytest.fixture
def job(store: FileStore, backbone_folder: Path, rows_file: Path, tmp_path: Path) -> Callable[..., ChildJob]:
    def build(work: str = "work", rows: Path | None = None, **asked: Any) -> ChildJob:
        """Without the export of its own weights' graph, which takes longer than all the rest, unless asked for."""
        hyperparameters = {"export": [], **asked}
        (tmp_path / work).mkdir(exist_ok=True)
        return ChildJob(
            job_id="ft_1",
            tenant="default",
            attempt=1,
            spec=JobSpec(dataset="ds_1", backbone="tiny", register_as="m", hyperparameters=hyperparameters),
            train=DatasetInput(id="ds_1", sha256="0" * 64, rows_file=rows or rows_file),
            backbone_folder=backbone_folder,
            store_root=store.root,
            work_dir=tmp_path / work,
            worker=WorkerProfile(cpu_threads=1),
        )

    return build


def finish(job: ChildJob, link: RecordingLink) -> dict[str, Any]:
    torch.manual_seed(0)
    run_job(job, link)
    assert link.result is not None
    return link.result


def served_logits(store: FileStore, manifest: ModelManifest) -> Callable[[Any], Any]:
    """What a server computes from the artefact alone."""
    parts = read_version(store, manifest)
    if parts.linear is not None:
        linear = parts.linear
        return lambda texts: linear.margins(list(texts))
    assert parts.head is not None
    head = parts.head
    from modeling.backbone import Backbone

    base = Backbone.open(store.local_path(f"backbones/{manifest.base.digest}")) if manifest.base else None
    backbone = parts.backbone or base
    assert backbone is not None
    engine = TorchEngine(backbone)
    if parts.adapter is not None:
        engine.load_adapter("a", parts.adapter)
    tokenizer = TextPreprocessor(backbone.folder, limit=parts.max_length or 64)

    def logits(texts: Any) -> Any:
        keys = ["a"] * len(texts) if parts.adapter is not None else None
        return head.logits(engine.run(EngineBatch(single(tokenizer.encode(list(texts))), keys)).pooled)

    return logits


WITHOUT_GPU = sorted(set(METHODS) - {"qlora"})
OPTIONS: dict[str, dict[str, Any]] = {
    **{method: {"method": method} for method in WITHOUT_GPU},
    "dora": {"method": "lora", "lora": {"dora": True, "r": 4}},
    "rslora": {"method": "lora", "lora": {"rslora": True}},
    "top layer": {"method": "full", "unfreeze_layers": 1},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_what_a_method_registers_reproduces_itself_from_the_store(
    job: Callable[..., ChildJob], store: FileStore, options: dict[str, Any]
) -> None:
    method = options["method"]
    result = finish(job(epochs=2, setfit={"max_pairs": 2000}, export=["onnx"], **options), RecordingLink())
    manifest = ModelManifest.model_validate(result["manifest"])
    assert manifest.method == method
    assert not store.exists(f"{manifest.prefix}/{MANIFEST_NAME}"), "only the supervisor may commit a version"
    check_golden(read_version(store, manifest), served_logits(store, manifest))
    assert result["evaluation"]["test"]["rows"] > 0
    assert {file.path for file in manifest.files} >= {
        "labels.json",
        "preprocess.json",
        "calibration.json",
        "golden.json",
        "reference_stats.json",
        "MODEL_CARD.md",
        "eval/report.json",
        "eval/confusion_matrix.csv",
        "train/params.json",
        "train/environment.json",
        "train/metrics.jsonl",
        "train/events.jsonl",
        "data/fingerprint.json",
        "eval/curves.json",
    }
    assert _events(store, manifest)[0]["type"] == "phase_changed"
    assert {event["type"] for event in _events(store, manifest)} >= {"evaluation_ready", "phase_changed"}
    if method == "linear_probe":  # no vector of these rows was there yet
        assert "loading_backbone" in {event["message"] for event in _events(store, manifest)}
    assert not any(file.path.endswith((".bin", ".pt", ".pkl", ".pth")) for file in manifest.files)
    has_graphs = any(file.path.startswith("full/graphs/") for file in manifest.files)
    assert has_graphs == (manifest.kind == "full")


@pytest.mark.parametrize("method", ["lora", "full", "bottleneck"])
def test_a_refit_learns_from_the_rows_that_it_was_chosen_on(
    job: Callable[..., ChildJob], store: FileStore, method: str
) -> None:
    options = {"method": method, "epochs": 2, "eval_every": 1, "learning_rate": 1e-3}
    alone = finish(job("alone", **options), RecordingLink())
    before = served_logits(store, ModelManifest.model_validate(alone["manifest"]))(["good film"])
    both = finish(job("both", refit=True, **options), RecordingLink())
    fitted, refitted = (
        next(item for item in result["evaluation"]["methods"] if item["method"] == method) for result in (alone, both)
    )
    assert refitted["validation"] == pytest.approx(fitted["validation"], abs=1e-6), "the first training's figures"
    sides = _fingerprint(store, both)["rows"]
    assert refitted["details"]["refit"]["rows"] == sides["train"] + sides["validation"]
    best, rows = refitted["details"]["best_step"], refitted["details"]["refit"]["rows"]
    assert refitted["details"]["refit"]["steps"] == max(1, round(best * rows / sides["train"]))
    assert "refit" not in fitted["details"]
    manifest = ModelManifest.model_validate(both["manifest"])
    check_golden(read_version(store, manifest), served_logits(store, manifest))
    assert not np.allclose(served_logits(store, manifest)(["good film"]), before, atol=1e-5)


@pytest.mark.parametrize("reason", ["no time", "out of time", "a loss that is not finite", "worse"])
def test_a_refit_that_does_not_come_out_well_leaves_the_first_model(
    job: Callable[..., ChildJob], store: FileStore, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    from finetune.training.loop import _Loop

    options = {"method": "full", "epochs": 2, "eval_every": 1, "learning_rate": 1e-3}
    alone = finish(job("alone", **options), RecordingLink())
    first = served_logits(store, ModelManifest.model_validate(alone["manifest"]))(["good film"])
    is_over, validate, time_left = _Loop._should_end, _Loop._validation_logits, Run.seconds_left

    def ends(self: _Loop) -> bool:
        if not self.run.holds_out and self.progress.step == 1:
            if reason == "a loss that is not finite":
                raise NonFiniteLoss(1, rows=[], learning_rate=1.0, precision="fp32")
            if reason == "out of time":
                self._end(reason)
        return is_over(self)

    def answers(self: _Loop) -> Any:
        logits = validate(self)
        if reason != "worse":
            return logits
        is_label = np.eye(logits.shape[1], dtype=np.float32)[self.run.validation.labels]
        return is_label if self.run.holds_out else -is_label

    def left(self: Run) -> float | None:
        return 1e-3 if not self.holds_out and reason == "no time" else time_left(self)

    monkeypatch.setattr(_Loop, "_should_end", ends)
    monkeypatch.setattr(_Loop, "_validation_logits", answers)
    monkeypatch.setattr(Run, "seconds_left", left)
    link = RecordingLink()
    cut = finish(job("cut", refit=True, **options), link)
    (event,) = (event for event in link.events if event["data"].get("code") == "refit_left_out")
    said = {
        "no time": "into the 0 s that are left",
        "out of time": "did not come to its end (out of time)",
        "worse": "it is worse",
    }
    assert said.get(reason, "infinite or NaN") in event["message"]
    assert "refit" not in next(one for one in cut["evaluation"]["methods"] if one["method"] == "full")["details"]
    kept = served_logits(store, ModelManifest.model_validate(cut["manifest"]))(["good film"])
    assert np.allclose(first, kept, atol=1e-6)


def test_a_refit_after_a_training_that_had_no_time_for_a_step_is_left_out(job: Callable[..., ChildJob]) -> None:
    link = RecordingLink()
    result = finish(job(method="full", refit=True, max_seconds=0.001), link)
    (method,) = (item for item in result["evaluation"]["methods"] if item["method"] == "full")
    assert method["details"]["steps"] == 0
    assert [event["data"]["code"] for event in link.of("data_warning")][-1] == "refit_left_out"


def test_a_refit_that_was_stopped_goes_on(job: Callable[..., ChildJob], store: FileStore) -> None:
    options = {"method": "lora", "epochs": 1, "eval_every": 1, "refit": True, "dropout": 0.1}
    whole = finish(job("whole", **options), RecordingLink())
    expected = read_version(store, ModelManifest.model_validate(whole["manifest"])).golden
    checks = {"in the refit": 0}

    def interrupt(events: list[dict[str, Any]]) -> None:
        phases = [event["data"].get("phase", event["message"]) for event in events if event["type"] == "phase_changed"]
        checks["in the refit"] += phases.count("training") == 2
        if checks["in the refit"] == 3:
            raise Stopped

    torch.manual_seed(0)
    with pytest.raises(Stopped):
        run_job(job("cut", **options), RecordingLink(interrupt))
    link = RecordingLink()
    resumed = finish(job("cut", **options), link)
    assert link.of("resumed")[-1]["data"]["step"] == 2
    golden = read_version(store, ModelManifest.model_validate(resumed["manifest"])).golden
    np.testing.assert_allclose([row.logits for row in golden], [row.logits for row in expected], atol=1e-5)


def _fingerprint(store: FileStore, result: dict[str, Any]) -> dict[str, Any]:
    prefix = ModelManifest.model_validate(result["manifest"]).prefix
    document: dict[str, Any] = json.loads(store.get_bytes(f"{prefix}/data/fingerprint.json", max_bytes=1 << 20))
    return document


def _events(store: FileStore, manifest: ModelManifest) -> list[dict[str, Any]]:
    text = store.get_bytes(f"{manifest.prefix}/train/events.jsonl", max_bytes=1 << 20).decode()
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def rare_rows(tmp_path: Path) -> Path:
    """One row of five is bad."""
    draw, folder = random.Random(1), tmp_path / "rare"
    folder.mkdir()
    lines = []
    for number in range(160):
        label = "bad" if number % 5 == 0 else "good"
        text = f"{draw.choice(GOOD if label == 'good' else BAD)} film {chr(97 + number % 26)}{number} it was {number}"
        lines.append(json.dumps({"text": text, "label": label}) + "\n")
    (folder / "raw").write_text("".join(lines))
    assert write_checked(folder / "raw", "jsonl", folder).is_valid
    return folder / ROWS_FILE


def test_oversampled_epochs_hold_the_rows_that_the_plan_says(job: Callable[..., ChildJob], rare_rows: Path) -> None:
    options = {"method": "full", "epochs": 2, "eval_every": 1, "rows": rare_rows, "batch_size": 8}
    refitted, link = {"refit": True, "oversample": True}, RecordingLink()
    plain, more = finish(job("plain", **options), RecordingLink()), finish(job("more", **options, **refitted), link)
    steps = []
    for result in (plain, more):
        (method,) = (item for item in result["evaluation"]["methods"] if item["method"] == "full")
        assert method["details"]["epochs"] == 2
        steps.append(method["details"]["steps"])
    assert steps[1] > 1.4 * steps[0]
    assert method["details"]["refit"]["steps"] > method["details"]["best_step"]


@pytest.mark.parametrize("method", ["baseline", "linear_probe"])
def test_methods_that_are_solved_weigh_classes_instead_of_repeating_rows(
    job: Callable[..., ChildJob], store: FileStore, rare_rows: Path, method: str
) -> None:
    answers = {}
    for name, values in (("plain", {}), ("more", {"oversample": True}), ("weighed", {"class_weights": "balanced"})):
        manifest = finish(job(name, method=method, rows=rare_rows, **values), RecordingLink())["manifest"]
        answers[name] = served_logits(store, ModelManifest.model_validate(manifest))(["good film", "dull film"])
    np.testing.assert_allclose(answers["more"], answers["weighed"], atol=1e-5)
    assert not np.allclose(answers["more"], answers["plain"], atol=1e-3)


def test_the_events_of_earlier_attempts_are_in_the_record(job: Callable[..., ChildJob], store: FileStore) -> None:
    earlier = {"job_id": "ft_1", "attempt": 1, "created_at": 1.0, "level": "warn", "type": "state_changed"}
    second = job(method="baseline").model_copy(
        update={"attempt": 2, "earlier_events": ({**earlier, "message": "the worker died", "data": {}},)}
    )
    manifest = ModelManifest.model_validate(finish(second, RecordingLink())["manifest"])
    events = _events(store, manifest)
    assert events[0]["message"] == "the worker died"
    assert [event["attempt"] for event in events] == [1] + [2] * (len(events) - 1)


def test_metadata_columns_become_slices_and_the_verdict_stands_in_the_card(
    job: Callable[..., ChildJob], store: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.training import recipe

    real = recipe._rows

    def with_site(rows: Any, labels: Any) -> Any:
        found = real(rows, labels)
        return dataclasses.replace(found, extras={"site": ["north"] * len(found)})

    monkeypatch.setattr(recipe, "_rows", with_site)
    result = finish(job(method="baseline", abstain={"target_accuracy": 0.9}), RecordingLink())
    side = result["evaluation"]["test"]
    (site,) = side["slices"]
    shown = sum(row["rows"] for row in site["values"])
    assert (site["column"], shown + site["left_out"]["too_few_rows"]["rows"]) == ("site", side["rows"])
    card = store.get_bytes("models/default/m/1/MODEL_CARD.md", max_bytes=1 << 20).decode()
    for heading in ("## Verdict", "## Abstention", "## Data", "## Environment", "## Limits"):
        assert heading in card
    for judgement in result["evaluation"]["verdict"]:
        assert judgement["message"] in card
    assert result["evaluation"]["abstention"]["target_accuracy"] == 0.9


@pytest.fixture
def tries_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` goes on although a tiny dataset has too few validation rows for it."""
    monkeypatch.setattr("finetune.training.recipe.least_discordant", lambda _: 0)


def test_auto_tries_the_methods_by_cost_and_keeps_the_best_on_validation(
    job: Callable[..., ChildJob], tries_all: None
) -> None:
    link = RecordingLink()
    evaluation = finish(job(epochs=2), link)["evaluation"]
    tried = {item["method"]: item["validation"]["macro_f1"] for item in evaluation["methods"]}
    assert list(tried) == ["baseline", "linear_probe", "lora", "full"]
    assert tried[evaluation["chosen"]] == max(tried.values())
    assert link.of("baseline_ready")
    assert evaluation["left_out"] == []


def test_auto_stops_where_no_model_could_be_told_from_the_best(job: Callable[..., ChildJob]) -> None:
    link = RecordingLink()
    result = finish(job(epochs=1), link)
    evaluation = result["evaluation"]
    assert [item["method"] for item in evaluation["methods"]] == ["baseline", "linear_probe"]
    assert [(one["method"], one["reason"]) for one in evaluation["left_out"]] == [
        ("lora", "cannot_be_told_apart"),
        ("full", "cannot_be_told_apart"),
    ]
    rows = evaluation["rows"]["validation"]
    for event in link.of("early_stopped"):
        assert f"of {rows} validation rows" in event["message"] and "method: " in event["message"]
    assert "methods_left_out" in {one["code"] for one in evaluation["verdict"]}
    asked = finish(job("asked", method="lora", epochs=1), RecordingLink())
    assert asked["manifest"]["method"] == "lora", "a method that is asked for is trained"


def test_the_best_so_far_is_told_from_the_first_method_on(job: Callable[..., ChildJob], tries_all: None) -> None:
    link = RecordingLink()
    finish(job(epochs=1), link)
    told = [event["data"] for event in link.of("best_updated")]
    assert told[0]["method"] == "baseline"
    values = {one["method"]: max(best["value"] for best in told if best["method"] == one["method"]) for one in told}
    assert link.columns["best"]["value"] == pytest.approx(max(values.values()))


def test_a_budget_leaves_out_what_does_not_fit_and_still_registers(job: Callable[..., ChildJob]) -> None:
    link = RecordingLink()
    evaluation = finish(job(max_seconds=2), link)["evaluation"]
    assert evaluation["methods"][0]["method"] == "baseline"
    assert len(evaluation["methods"]) < 4
    assert any(event["data"].get("code") == "budget" for event in link.of("data_warning"))


def test_a_budget_used_up_before_the_first_method_ends_still_registers_it(job: Callable[..., ChildJob]) -> None:
    result = finish(job(max_seconds=0.001), RecordingLink())
    assert [item["method"] for item in result["evaluation"]["methods"]] == ["baseline"]
    assert result["manifest"]["kind"] == "baseline"


@pytest.mark.parametrize("method", sorted({"setfit", "prompt_tuning", "bottleneck", "lora", "full"}))
def test_a_method_alone_with_no_time_left_still_registers(job: Callable[..., ChildJob], method: str) -> None:
    assert finish(job(method=method, max_seconds=0.001), RecordingLink())["manifest"]["method"] == method


def test_auto_tries_pairs_where_rows_are_few(job: Callable[..., ChildJob], tmp_path: Path, tries_all: None) -> None:
    folder = tmp_path / "few"
    folder.mkdir()
    texts = [f"{word} film {letter}" for word in (*GOOD, *BAD) for letter in "abcdef"]
    lines = [{"text": text, "label": "good" if text.split(" film")[0] in GOOD else "bad"} for text in texts]
    (folder / "raw").write_text("\n".join(json.dumps(line) for line in lines))
    write_checked(folder / "raw", "jsonl", folder)
    few = job(rows=folder / ROWS_FILE, epochs=1, setfit={"max_pairs": 2000})
    evaluation = finish(few, RecordingLink())["evaluation"]
    assert [item["method"] for item in evaluation["methods"]] == ["baseline", "linear_probe", "setfit", "lora", "full"]


def test_a_second_job_on_the_same_rows_computes_no_vectors(
    job: Callable[..., ChildJob], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[int] = []
    run_all = embedding.run_all

    def counted(engine: Any, rows: Any, **options: Any) -> Any:
        computed.append(len(rows))
        return run_all(engine, rows, **options)

    monkeypatch.setattr(embedding, "run_all", counted)
    kept = EmbeddingInput(cache=tmp_path / "features", cache_bytes=1 << 20)
    for seed in (1, 2):
        spec = job(method="linear_probe", seed=seed, split={"strategy": "random"})
        result = finish(spec.model_copy(update={"embedding": kept}), RecordingLink())
        if seed == 1:
            assert sum(computed) == sum(result["evaluation"]["rows"].values())
            computed.clear()
    assert computed == [], "another split of the same texts"


def test_a_probe_on_known_vectors_does_without_torch(job: Callable[..., ChildJob], tmp_path: Path) -> None:
    """Its imports would take longer than the job."""
    kept = EmbeddingInput(cache=tmp_path / "features", cache_bytes=1 << 20)
    probe = job(method="linear_probe").model_copy(update={"embedding": kept})
    first = finish(probe, RecordingLink())
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "finetune.worker.child"],
        capture_output=True,
        text=True,
        timeout=120,
        input=f'{probe.model_dump_json()}\n{{"kind": "reserved", "version": 1}}\n',
    )
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["kind"] == "succeeded", done.stderr[-2000:]
    assert last["evaluation"]["validation"] == first["evaluation"]["validation"]
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "finetune.training.recipe" in imported
    assert not imported & {"torch", "transformers", "accelerate", "peft", "onnxruntime"}


def _stop_after(steps: int, error: Exception) -> Callable[[list[dict[str, Any]]], None]:
    """After so many looks since the training began, which a run makes one of a step."""
    calls = {"left": steps}

    def interrupt(events: list[dict[str, Any]]) -> None:
        if not any(event["message"] == "training" for event in events):
            return
        calls["left"] -= 1
        if calls["left"] < 0:
            raise error

    return interrupt


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("steps", [1, 7])
def test_a_resumed_run_ends_like_an_uninterrupted_one(
    job: Callable[..., ChildJob], store: FileStore, method: str, steps: int
) -> None:
    whole = finish(job("whole", method=method, epochs=3, dropout=0.1), RecordingLink())
    expected = read_version(store, ModelManifest.model_validate(whole["manifest"])).golden

    torch.manual_seed(0)
    with pytest.raises(Stopped):
        run_job(job("cut", method=method, epochs=3, dropout=0.1), RecordingLink(_stop_after(steps, Stopped())))
    link = RecordingLink()
    resumed = finish(job("cut", method=method, epochs=3, dropout=0.1), link)

    assert link.of("resumed")
    golden = read_version(store, ModelManifest.model_validate(resumed["manifest"])).golden
    np.testing.assert_allclose([row.logits for row in golden], [row.logits for row in expected], atol=1e-5)
    assert resumed["evaluation"]["test"]["loss"] == pytest.approx(whole["evaluation"]["test"]["loss"], abs=1e-6)


def test_cancel_keeps_the_best_so_far_if_asked(job: Callable[..., ChildJob], store: FileStore) -> None:
    link = RecordingLink(_stop_after(5, Cancelled(keep_best=True)))
    result = finish(job(method="lora", epochs=10), link)
    assert result["was_cancelled"]
    details = result["evaluation"]["methods"][0]["details"]
    assert details["stopped"] == "cancelled"
    cut = result["evaluation"]["cut_short"]
    assert (cut["by"], cut["method"], cut["steps"]) == ("cancel", "lora", details["steps"])
    assert cut["steps"] < cut["total_steps"]
    card = store.get_bytes(
        f"{ModelManifest.model_validate(result['manifest']).prefix}/MODEL_CARD.md", max_bytes=1 << 20
    ).decode()
    assert f"lora was trained for {cut['steps']} of {cut['total_steps']} steps" in card
    assert "cancelled before the end" in card


PHASES = ["embedding", "training", "evaluating", "calibrating", "exporting", "registering"]


def _cancel_in(phase: str, *, keep_best: bool) -> Callable[[list[dict[str, Any]]], None]:
    """From that phase on, a cancel is seen at every look."""

    def interrupt(events: list[dict[str, Any]]) -> None:
        if any(event["type"] == "phase_changed" and event["message"] == phase for event in events):
            raise Cancelled(keep_best=keep_best)

    return interrupt


@pytest.mark.parametrize(
    ("method", "phase"),
    [
        ("linear_probe", "embedding"),
        *((method, phase) for method in ("linear_probe", "lora") for phase in PHASES[1:-1]),
    ],
)
def test_a_cancel_that_keeps_nothing_ends_the_run_in_every_phase(
    job: Callable[..., ChildJob], method: str, phase: str
) -> None:
    link = RecordingLink(_cancel_in(phase, keep_best=False))
    with pytest.raises(Cancelled):
        run_job(job(method=method, epochs=2), link)
    assert link.result is None
    seen = [event["message"] for event in link.of("phase_changed") if event["message"] in PHASES]
    assert PHASES.index(seen[-1]) <= PHASES.index(phase) + 1, seen


@pytest.mark.parametrize("phase", ["evaluating", "calibrating", "exporting"])
def test_a_cancel_that_keeps_the_best_after_the_training_loses_nothing(
    job: Callable[..., ChildJob], phase: str
) -> None:
    result = finish(job(method="linear_probe"), RecordingLink(_cancel_in(phase, keep_best=True)))
    assert result["was_cancelled"]
    assert result["evaluation"]["cut_short"] is None, "all that was to be trained was"


def test_methods_that_a_cancel_left_out_are_named(job: Callable[..., ChildJob], tries_all: None) -> None:
    def after_the_probe(events: list[dict[str, Any]]) -> None:
        if any(event["type"] == "metrics" and event["data"].get("method") == "linear_probe" for event in events):
            raise Cancelled(keep_best=True)

    evaluation = finish(job(epochs=1), RecordingLink(after_the_probe))["evaluation"]
    trained = [item["method"] for item in evaluation["methods"]]
    assert trained[:2] == ["baseline", "linear_probe"] and "full" not in trained
    assert "full" in evaluation["cut_short"]["not_trained"]
    assert "cut_short" in {one["code"] for one in evaluation["verdict"]}


def test_a_budget_that_cuts_a_training_short_is_on_the_record(job: Callable[..., ChildJob]) -> None:
    evaluation = finish(job(method="lora", epochs=3, max_seconds=0.001), RecordingLink())["evaluation"]
    assert evaluation["cut_short"]["by"] == "max_seconds"


def test_cancel_without_keeping_registers_nothing(job: Callable[..., ChildJob]) -> None:
    link = RecordingLink(_stop_after(3, Cancelled(keep_best=False)))
    with pytest.raises(Cancelled):
        run_job(job(method="lora", epochs=10), link)
    assert link.result is None


def test_a_full_disk_during_a_checkpoint_warns_and_training_goes_on(
    job: Callable[..., ChildJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("finetune.training.loop.save_checkpoint", no_space)
    link = RecordingLink()
    assert finish(job(method="lora", epochs=1), link)
    assert any(event["data"].get("code") == "checkpoint_not_saved" for event in link.of("data_warning"))


def test_a_dataset_with_one_class_never_trains(job: Callable[..., ChildJob], tmp_path: Path) -> None:
    folder = tmp_path / "one"
    folder.mkdir()
    (folder / "raw").write_text("\n".join(json.dumps({"text": f"film {i}", "label": "only"}) for i in range(30)))
    write_checked(folder / "raw", "jsonl", folder)
    link = RecordingLink()
    with pytest.raises(DatasetInvalid) as refused:
        run_job(job(rows=folder / ROWS_FILE), link)
    assert [finding["code"] for finding in refused.value.failure.findings] == ["single_class"]
    assert link.columns.get("plan") is None


def test_early_stopping_restores_the_best(job: Callable[..., ChildJob]) -> None:
    link = RecordingLink()
    evaluation = finish(job(method="lora", epochs=30, early_stopping={"patience": 1}), link)["evaluation"]
    details = evaluation["methods"][0]["details"]
    assert details["stopped"] == "early stopping"
    assert details["best_step"] < details["steps"]
    best = max(entry["macro_f1"] for entry in details["history"])
    assert evaluation["methods"][0]["validation"]["macro_f1"] == pytest.approx(best)
