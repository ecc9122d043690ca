"""The whole job, top to bottom, in the child process.

1. prepare: read and inspect the rows, split them, resolve the plan  2. train the methods, cheapest first
3. register: the best on validation wins; calibrate, evaluate on test as it will be served, write, report.
"""

from __future__ import annotations

import contextlib
import logging
import random
import resource
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ValidationError

from finetune.data import load as datasets
from finetune.data.findings import too_long
from finetune.data.labelled import LabelledRows
from finetune.data.records import has_errors
from finetune.evaluation.intervals import least_discordant
from finetune.evaluation.tasks import rules_of
from finetune.evaluation.verdict import of_rerun
from finetune.jobs.failures import Cancelled, DatasetInvalid, RunError, Stopped
from finetune.jobs.hyperparameters import Hyperparameters, check_labels, parse_hyperparameters
from finetune.jobs.link import ChildJob, Journal, Link, Original, tell
from finetune.jobs.plan import DatasetProfile, MethodPlan, TrainingPlan, WorkerProfile, resolve
from finetune.jobs.records import JobPhase
from finetune.jobs.search_space import with_values
from finetune.training.artefact import (
    environment,
    stage_weights,
    store_artefact,
    write_documents,
    write_events,
    write_judgement,
    write_weights,
)
from finetune.training.coverage import foreign_texts
from finetune.training.embedding import FrozenVectors, release_free_memory
from finetune.training.feature_cache import FeatureCache
from finetune.training.methods import METHODS
from finetune.training.methods.candidate import CANCELLED, OUT_OF_TIME, Candidate
from finetune.training.pace import Pace, Stage
from finetune.training.promotion import Contender, judge
from finetune.training.report import Outcome, assess
from finetune.training.reproduction import comparison, weight_digests
from finetune.training.run_context import Rows, Run
from finetune.training.search import Replan, search
from finetune.training.suspects import all_rows, find_suspects
from finetune.training.windows import count_windows
from model_registry.store import FileStore
from modeling.backbone import Backbone

if TYPE_CHECKING:
    from finetune.training.parallel import Ranks

_log = logging.getLogger("finetune.training.recipe")

_FINISHING = "finishing"
_SIGNIFICANT = 0.05


def run_job(job: ChildJob, link: Link, pace: Pace | None = None) -> None:
    """Run one job to its registration. Raises `RunError`, `Cancelled` (nothing to keep), `Stopped`."""
    journal = Journal(link, job_id=job.job_id, attempt=job.attempt, earlier=job.earlier_events)
    run, replan = prepare(job, journal, pace or Pace(elapsed_s=job.elapsed_s, percent=job.percent))
    register(job, run, train(run, replan), journal)


def prepare(job: ChildJob, link: Link, pace: Pace) -> tuple[Run, Replan]:
    """Read the rows, look for label errors, resolve the plan. Raises `DatasetInvalid`, `PlanError`."""
    started = time.monotonic()
    wanted = parse_hyperparameters(job.spec.hyperparameters)
    random.seed(wanted.seed)
    np.random.seed(wanted.seed)
    link.phase(JobPhase.PREPARING_DATA)
    train, validation, test = load_sides(job, wanted, link)
    link.check_cancelled()
    cache = feature_cache(job)
    suspects = []
    if train.target.has_suspects:
        suspects = find_suspects(all_rows(train, validation, test), link, seed=wanted.seed, cache=cache)
    release_free_memory()
    link.check_cancelled()
    # A class that a column or a given dataset puts on a later side alone is never answered.
    labels = tuple(sorted(train.names() | validation.names() | test.names()))
    check_labels(wanted, labels)
    backbone = Backbone.open(job.backbone_folder)
    vectors = frozen_vectors(job, backbone, cache)
    replan = planner(job, wanted, vectors, train, validation, test, link)
    plan = replan({})
    foreign = [] if [one.method for one in plan.methods] == ["baseline"] else foreign_texts(train, vectors)
    tell(link, foreign)
    link.set(plan=plan.model_dump(mode="json"))
    run = Run(
        train=_rows(train, labels),
        validation=_rows(validation, labels),
        test=_rows(test, labels),
        labels=labels,
        plan=plan,
        backbone=backbone,
        link=link,
        work_dir=job.work_dir,
        earlier_work_dirs=job.earlier_work_dirs,
        deadline=None if plan.max_seconds is None else started + plan.max_seconds - job.elapsed_s,
        vectors=vectors,
        suspects=suspects,
        pace=pace,
        is_rerun=job.original is not None,
        foreign_texts=foreign,
    )
    pace.plan(stages(plan))
    pace.deadline = run.deadline
    return run, replan


def stages(plan: TrainingPlan) -> list[Stage]:
    """What a run spends its time on once it has a plan."""
    times = {one.method: (one.estimated_seconds or 0.0) * max(1, plan.trials) for one in plan.methods}
    methods = [Stage(name, seconds, is_telling=name != "baseline") for name, seconds in times.items()]
    again = max(0.0, plan.estimated_seconds - sum(times.values())) if plan.max_seconds is None else 0.0
    return [*methods, Stage(_FINISHING, again + 2.0 + 0.1 * sum(times.values()), is_telling=False)]


def train(run: Run, replan: Replan) -> list[Candidate]:
    """Train what the plan lists, or search over the one method of a plan with trials."""
    with _ranks(run.plan, run.work_dir) as run.ranks:
        candidates = [search(run, replan)] if run.plan.trials else train_methods(run)
    run.ranks = None
    return candidates


def register(job: ChildJob, run: Run, candidates: Sequence[Candidate], journal: Journal) -> None:
    """Choose the best candidate, evaluate it as it will be served, write its version and report it."""
    link, best = run.link, choose(candidates, run)
    cut = cut_short(run, best)
    run.is_finishing = True
    run.pace.enter(_FINISHING, _finishing_s(run, best))
    _enter(run, JobPhase.EVALUATING)
    servable = best.finish()
    run.heed()
    test_logits = servable.logits(run.test.examples) if len(run.test) else None
    _enter(run, JobPhase.CALIBRATING)
    answering = run.rules.calibrate(
        best.validation_logits, run.validation.labels, with_temperature=run.plan.calibration == "temperature"
    )
    evaluation, curves = assess(run, Outcome(candidates, best, test_logits, answering, cut))
    evaluation["suspects"] = run.suspects
    link.event("evaluation_ready", f"{best.method} was the best on validation", _headline(run, evaluation))

    _enter(run, JobPhase.EXPORTING)
    store = FileStore(job.store_root, is_there=True)
    with tempfile.TemporaryDirectory(prefix="polyhead-version-", dir=job.work_dir) as name:
        folder = Path(name)
        stage_weights(folder, run, best, servable)
        run.heed()
        contender = Contender(best, servable, folder, test_logits, answering, evaluation)
        evaluation["promotion"] = judge(job, run, link, store, contender)
        write_weights(folder, run, best, servable, answering=answering, evaluation=evaluation)
        _record_weights(folder, job, run, evaluation)
        write_documents(folder, job, run, best, answering=answering, evaluation=evaluation)
        write_judgement(folder, evaluation, curves, run.labels)
        _enter(run, JobPhase.REGISTERING)
        version = link.reserve(kind=best.kind, method=best.method)
        write_events(folder, journal.entries)
        manifest = store_artefact(store, folder, job, run, best, version=version, evaluation=evaluation)
    link.succeed(manifest=manifest.model_dump(mode="json"), evaluation=evaluation, was_cancelled=run.is_winding_down)


def _record_weights(folder: Path, job: ChildJob, run: Run, evaluation: dict[str, Any]) -> None:
    """Notes the weights' digests and what they depend on, and for a rerun whether they are what they were."""
    evaluation["weights"], evaluation["environment"] = weight_digests(folder), environment(run)
    evaluation["rerun"] = found = None if job.original is None else comparison(job.original, evaluation)
    if found is not None:
        evaluation["verdict"].append(asdict(of_rerun(found)))
        level = "warn" if found["is_equal"] is False else "info"
        run.link.event("metrics", found["message"], {"split": "weights", **found}, level=level)


def _enter(run: Run, phase: JobPhase) -> None:
    run.heed()
    run.link.phase(phase)
    run.link.progress(**run.pace.values())


def _finishing_s(run: Run, best: Candidate) -> float:
    """A refit takes about as long as the training did."""
    return 2.0 + best.seconds * (1.2 if run.plan.refit and best.kind in {"lora", "full"} else 0.3)


# Data


def load_sides(job: ChildJob, wanted: Hyperparameters, link: Link) -> tuple[LabelledRows, LabelledRows, LabelledRows]:
    """Read train, validation and test rows; what the request does not bring is split off. Raises `DatasetInvalid`."""
    inputs = {"train": job.train, "validation": job.validation, "test": job.test}
    files = {side: given.rows_file for side, given in inputs.items() if given is not None}
    sides = datasets.load_sides(
        files,
        columns=job.spec.columns_by_side,
        options=wanted.split,
        seed=wanted.seed,
        task=job.spec.task,
        rare=wanted.rare,
        exclude=job.spec.exclude_rows,
    )
    tell(link, sides.findings)
    if has_errors(sides.findings):
        errors = [finding for finding in sides.findings if finding.severity == "error"]
        message = "; ".join(finding.message for finding in errors)[:1000]
        raise DatasetInvalid(message, [finding.model_dump(mode="json") for finding in errors])
    return sides.train, sides.validation, sides.test


def _rows(rows: LabelledRows, labels: Sequence[str]) -> Rows:
    names = [rows.target.names_of(label) for label in rows.labels]
    targets = rules_of(rows.target.task).encode(names, rows.labels, labels)
    return Rows(rows.examples, targets, rows.row_numbers, rows.extras)


# Plan


def planner(
    job: ChildJob,
    wanted: Hyperparameters,
    vectors: FrozenVectors,
    train: LabelledRows,
    validation: LabelledRows,
    test: LabelledRows,
    link: Link,
) -> Replan:
    """Make the function that plans this job, with a trial's hyperparameters instead of those asked for."""
    info, task = vectors.backbone.info, train.target.task
    lengths = vectors.lengths(train.examples).tolist()
    rows = len(train)
    if rules_of(task).by_position:  # of each text every window is a row of a step
        rows = count_windows(vectors.preprocessor, train.examples)
    data = DatasetProfile(
        train_rows=rows,
        validation_rows=len(validation),
        test_rows=len(test),
        labels=len(train.names()),
        max_length_p99=int(np.ceil(np.percentile(lengths, 99))),
        largest_class=train.most_of_a_label(),
    )

    def replan(chosen: Mapping[str, Any]) -> TrainingPlan:
        if job.original is not None and not chosen and (known := repeated(job.original, job.worker)) is not None:
            return known
        plan = resolve(
            parse_hyperparameters(with_values(job.spec.hyperparameters, chosen)) if chosen else wanted,
            data=data,
            worker=job.worker,
            parameters=info.parameters,
            model_max_length=info.max_length,
            task=task,
        )
        return plan if not chosen else keep_head_rate(plan, replan({}))

    if not rules_of(task).by_position:
        tell(link, too_long(train, lengths, replan({}).max_length))
    return replan


def repeated(original: Original, worker: WorkerProfile) -> TrainingPlan | None:
    """The plan of the job that this one repeats, with the methods that were trained; None if it cannot be followed."""
    try:
        plan = TrainingPlan.model_validate(original.plan)
    except ValidationError:  # it had none, or an earlier release made it
        return None
    if plan.device != worker.device or plan.processes > 1:
        return None
    methods = tuple(one for one in plan.methods if one.method in original.methods) or plan.methods
    # What took its time then may take longer now; what was cut short then is not to run on for ever.
    budget = plan.max_seconds if original.recorded("cut_short") else None
    return plan.model_copy(update={"methods": methods, "max_seconds": budget, "cpu_threads": worker.cpu_threads})


def keep_head_rate(plan: TrainingPlan, base: TrainingPlan) -> TrainingPlan:
    """A search over the backbone's rate leaves the head's alone, where a rate that was asked for holds for both."""
    rates = {method.method: method.head_learning_rate for method in base.methods}
    methods = tuple(one.model_copy(update={"head_learning_rate": rates[one.method]}) for one in plan.methods)
    return plan.model_copy(update={"methods": methods, "space": base.space})


def feature_cache(job: ChildJob) -> FeatureCache | None:
    given = job.embedding
    if given.cache is None or given.cache_bytes == 0:
        return None
    return FeatureCache(given.cache, budget_bytes=given.cache_bytes)


def frozen_vectors(job: ChildJob, backbone: Backbone, cache: FeatureCache | None) -> FrozenVectors:
    return FrozenVectors(
        backbone,
        job.embedding.engine,
        graphs=job.embedding.graphs,
        cache=cache,
        device=job.worker.device,
        threads=job.worker.cpu_threads,
    )


# Methods


def _ranks(plan: TrainingPlan, work_dir: Path) -> contextlib.AbstractContextManager[Ranks | None]:
    """The other processes of a plan with several. A plan with one must not import torch for them."""
    if plan.processes == 1:
        return contextlib.nullcontext()
    from finetune.training.parallel import Ranks

    return contextlib.closing(Ranks(plan, work_dir=work_dir))


def train_methods(run: Run) -> list[Candidate]:
    """Trains what the plan lists, cheapest first; stops early if the budget, a cancel or the rows say so."""
    candidates: list[Candidate] = []
    for planned in run.plan.methods:
        reason = _reason_to_leave_out(run, planned, candidates)
        if reason is not None:
            run.leave_out(planned.method, *reason)
            continue
        run.pace.enter(planned.method)
        try:
            candidate = _attempt(run, planned.method)
        except Cancelled as request:
            if not request.keep_best or not candidates:
                raise
            run.is_winding_down = True
            run.leave_out(planned.method, "cancelled", f"{planned.method} is left out: the job was cancelled")
            continue
        if candidate is None:
            continue
        peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # of this process, so far
        candidate.details["peak_mb"] = round(peak_kib * 1024 / 1e6)
        candidates.append(candidate)
        _announce(run, candidate, candidates)
    return candidates


def _attempt(run: Run, method: str) -> Candidate | None:
    """Train by one method. None, which is told, if it fails and another may still give a model; what may pass, or hits
    every method alike, is raised, as is the last failure of all."""
    try:
        return METHODS[method](run)
    except (Cancelled, Stopped, OSError):
        raise
    except Exception as error:
        if len(run.failed_methods) + 1 == len(run.plan.methods):
            raise
        if isinstance(error, RunError) and error.failure.retryable:
            raise
        _log.exception(f"{method} failed", extra={"action": "method_failed"})
        reason = str(error) if isinstance(error, RunError) else f"the log has the details ({type(error).__name__})"
        run.failed_methods.append({"method": method, "reason": reason[:500]})
        message = f"{method} failed, the other methods go on: {reason}"[:500]
        run.link.event("data_warning", message, {"code": "method_failed", "method": method}, level="warn")
        return None


def _reason_to_leave_out(run: Run, planned: MethodPlan, candidates: Sequence[Candidate]) -> tuple[str, str] | None:
    """Why a method is not trained after those that were, as a code and a sentence; None if it is."""
    method = planned.method
    if not candidates:
        return None
    if run.is_winding_down:
        return "cancelled", f"{method} is left out: the job was cancelled"
    needed, left = run.pace.seconds_of(planned.estimated_seconds or 0.0), run.seconds_left()
    # Half of an estimate still leaves time for a useful, shorter run of a method that stops on time.
    if left is not None and left < needed * 0.5:
        return "budget", f"{method} is left out: it needs about {needed:.0f} s, {max(0.0, left):.0f} s are left"
    return None if run.is_rerun else _cannot_be_told_apart(run, method, candidates)


def _cannot_be_told_apart(run: Run, method: str, candidates: Sequence[Candidate]) -> tuple[str, str] | None:
    """Why not even a perfect model could be shown to be better than the best one on these validation rows.

    The cheap methods are tried in any case.
    """
    if method in {"baseline", "linear_probe"}:
        return None
    best = _best_of(candidates, run)
    misses = run.rules.misses(best.validation_logits, run.validation.labels)
    needed = least_discordant(_SIGNIFICANT)
    if misses >= needed:
        return None
    rows = len(run.validation)
    text = f"{method} is left out: {best.method} misses {misses} of {rows} validation rows, and at least {needed} must "
    text += f"differ before even a perfect model could be told from it. `method: {method}` trains it all the same"
    return "cannot_be_told_apart", text


def cut_short(run: Run, best: Candidate) -> dict[str, Any] | None:
    """What a cancel or the budget cut off; None if the chosen method came to its end, and no cancel left others out."""
    stopped = best.details.get("stopped")
    is_cut = stopped in {CANCELLED, OUT_OF_TIME}
    not_trained = [one["method"] for one in run.left_out if one["reason"] == "cancelled"]
    if not is_cut and not not_trained:
        return None
    return {
        "by": "max_seconds" if stopped == OUT_OF_TIME and not run.is_winding_down else "cancel",
        "method": best.method,
        "steps": best.details.get("steps"),
        "total_steps": run.plan_of(best.method).total_steps or None,
        "not_trained": not_trained,
    }


def _announce(run: Run, candidate: Candidate, candidates: Sequence[Candidate]) -> None:
    values = run.rules.summary(candidate.validation_logits, run.validation.labels)
    data = {"method": candidate.method, "split": "validation", "values": values, "seconds": round(candidate.seconds, 2)}
    text = f"{candidate.method}: {run.plan.metric} {values[run.plan.metric]:.4f} on {len(run.validation.labels)} rows"
    run.link.event("baseline_ready" if candidate.method == "baseline" else "metrics", text, data)
    if _best_of(candidates, run) is candidate and "history" not in candidate.details:
        value = run.score(candidate.validation_logits)
        best = {"metric": run.plan.metric, "value": value, "step": 0, "method": candidate.method}
        run.link.event("best_updated", f"{candidate.method}: {run.plan.metric} {value:.4f}", best)


def _best_of(candidates: Sequence[Candidate], run: Run) -> Candidate:
    """The best on validation; among equals the cheaper one, which comes first."""
    return candidates[run.plan.deciding.best([run.score(one.validation_logits) for one in candidates])]


def choose(candidates: Sequence[Candidate], run: Run) -> Candidate:
    """What `_best_of` gives, told as the best of the job."""
    best = _best_of(candidates, run)
    value = run.score(best.validation_logits)
    run.link.set(best={"metric": run.plan.metric, "value": value, "method": best.method, "step": 0})
    return best


# Evaluation


def _headline(run: Run, evaluation: dict[str, Any]) -> dict[str, Any]:
    picked = [name for name in (*run.rules.figures, "intervals_95", "ece_after") if name in evaluation["validation"]]
    sides = {side: evaluation[side] for side in ("validation", "test") if evaluation[side] is not None}
    return {
        "chosen": evaluation["chosen"],
        "verdict": [judgement["message"] for judgement in evaluation["verdict"]],
        "methods": {item["method"]: item["validation"] for item in evaluation["methods"]},
        **{side: {name: numbers[name] for name in picked} for side, numbers in sides.items()},
    }
