"""The whole job, top to bottom, in the child process.

1. prepare: read and inspect the rows, split them, resolve the plan  2. train the methods, cheapest first
3. register: the best on validation wins; calibrate, evaluate on test as it will be served, write, report.
"""

from __future__ import annotations

import contextlib
import random
import resource
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.data import load as datasets
from finetune.data.findings import too_long
from finetune.data.labelled import LabelledRows
from finetune.data.records import has_errors
from finetune.evaluation.tasks import rules_of
from finetune.jobs.failures import Cancelled, DatasetInvalid, RunError
from finetune.jobs.hyperparameters import Hyperparameters, parse_hyperparameters
from finetune.jobs.link import ChildJob, Journal, Link, tell
from finetune.jobs.plan import DatasetProfile, TrainingPlan, resolve
from finetune.jobs.records import JobPhase
from finetune.jobs.search_space import with_values
from finetune.training.artefact import stage_weights, store_artefact, write_artefact, write_events, write_judgement
from finetune.training.embedding import FrozenVectors, release_free_memory
from finetune.training.feature_cache import FeatureCache
from finetune.training.methods import METHODS
from finetune.training.methods.candidate import Candidate
from finetune.training.promotion import Contender, judge
from finetune.training.report import Outcome, assess
from finetune.training.run_context import Rows, Run
from finetune.training.search import Replan, search
from finetune.training.suspects import find_suspects
from model_registry.store import FileStore
from modeling.backbone import Backbone

if TYPE_CHECKING:
    from finetune.training.parallel import Ranks


def run_job(job: ChildJob, link: Link) -> None:
    """Run one job to its registration. Raises `RunError`, `Cancelled` (nothing to keep), `Stopped`."""
    journal = Journal(link, job_id=job.job_id, attempt=job.attempt, earlier=job.earlier_events)
    run, replan = prepare(job, journal)
    register(job, run, train(run, replan), journal)


def prepare(job: ChildJob, link: Link) -> tuple[Run, Replan]:
    """Read the rows, look for label errors, resolve the plan. Raises `DatasetInvalid`, `PlanError`."""
    started = time.monotonic()
    wanted = parse_hyperparameters(job.spec.hyperparameters)
    random.seed(wanted.seed)
    np.random.seed(wanted.seed)
    link.phase(JobPhase.PREPARING_DATA)
    train, validation, test = load_sides(job, wanted, link)
    cache = feature_cache(job)
    suspects = find_suspects(train, link, seed=wanted.seed, cache=cache) if train.target.has_suspects else []
    release_free_memory()
    # Where near duplicates differ in their labels, a rare one may be on a later side alone; it is then never given.
    labels = tuple(sorted(train.names() | validation.names() | test.names()))
    check_class_weights(wanted, labels)
    backbone = Backbone.open(job.backbone_folder)
    vectors = frozen_vectors(job, backbone, cache)
    replan = planner(job, wanted, vectors, train, validation, test, link)
    plan = replan({})
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
    )
    return run, replan


def train(run: Run, replan: Replan) -> list[Candidate]:
    """Train what the plan lists, or search over the one method of a plan with trials."""
    with _ranks(run.plan, run.work_dir) as run.ranks:
        candidates = [search(run, replan)] if run.plan.trials else train_methods(run)
    run.ranks = None
    return candidates


def register(job: ChildJob, run: Run, candidates: Sequence[Candidate], journal: Journal) -> None:
    """Choose the best candidate, evaluate it as it will be served, write its version and report it."""
    link, best = run.link, choose(candidates, run)
    link.phase(JobPhase.EVALUATING)
    servable = best.finish()
    test_logits = servable.logits(run.test.examples) if len(run.test) else None
    link.phase(JobPhase.CALIBRATING)
    answering = run.rules.calibrate(
        best.validation_logits, run.validation.labels, with_temperature=run.plan.calibration == "temperature"
    )
    evaluation, curves = assess(run, Outcome(candidates, best, test_logits, answering))
    evaluation["suspects"] = run.suspects
    link.event("evaluation_ready", f"{best.method} was the best on validation", _headline(run, evaluation))

    link.phase(JobPhase.EXPORTING)
    store = FileStore(job.store_root, is_there=True)
    with tempfile.TemporaryDirectory(prefix="polyhead-version-", dir=job.work_dir) as name:
        folder = Path(name)
        stage_weights(folder, run, best, servable)
        contender = Contender(best, servable, folder, test_logits, answering, evaluation)
        evaluation["promotion"] = judge(job, run, link, store, contender)
        write_artefact(folder, job, run, best, servable, answering=answering, evaluation=evaluation)
        write_judgement(folder, evaluation, curves, run.labels)
        link.phase(JobPhase.REGISTERING)
        version = link.reserve(kind=best.kind, method=best.method)
        write_events(folder, journal.entries)
        manifest = store_artefact(store, folder, job, run, best, version=version, evaluation=evaluation)
    link.succeed(manifest=manifest.model_dump(mode="json"), evaluation=evaluation, was_cancelled=run.is_winding_down)


# Data


def load_sides(job: ChildJob, wanted: Hyperparameters, link: Link) -> tuple[LabelledRows, LabelledRows, LabelledRows]:
    """Read train, validation and test rows; what the request does not bring is split off. Raises `DatasetInvalid`."""
    inputs = {"train": job.train, "validation": job.validation, "test": job.test}
    files = {side: given.rows_file for side, given in inputs.items() if given is not None}
    sides = datasets.load_sides(
        files, columns=job.spec.columns, options=wanted.split, seed=wanted.seed, task=job.spec.task
    )
    tell(link, sides.findings)
    if has_errors(sides.findings):
        errors = [finding for finding in sides.findings if finding.severity == "error"]
        message = "; ".join(finding.message for finding in errors)[:1000]
        raise DatasetInvalid(message, [finding.model_dump(mode="json") for finding in errors])
    return sides.train, sides.validation, sides.test


def check_class_weights(wanted: Hyperparameters, labels: Sequence[str]) -> None:
    """Raises `RunError` for a weight on a label that the data does not have: a misspelling would do nothing."""
    unknown = sorted(set(wanted.class_weights) - set(labels)) if isinstance(wanted.class_weights, dict) else []
    if unknown:
        raise RunError(
            "invalid_hyperparameters",
            f"class_weights names the label {unknown[0][:100]!r}, which the data does not have",
            hint=f"the labels are {', '.join(labels)[:300]}",
        )


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
    """Make the function that plans this job, with a trial's hyperparameters in the place of those asked for."""
    info, task = vectors.backbone.info, train.target.task
    lengths = vectors.lengths(train.examples).tolist()
    data = DatasetProfile(
        train_rows=len(train),
        validation_rows=len(validation),
        test_rows=len(test),
        labels=len(train.names()),
        max_length_p99=int(np.ceil(np.percentile(lengths, 99))),
        largest_class=train.most_of_a_label(),
    )

    def replan(chosen: Mapping[str, Any]) -> TrainingPlan:
        plan = resolve(
            parse_hyperparameters(with_values(job.spec.hyperparameters, chosen)) if chosen else wanted,
            data=data,
            worker=job.worker,
            parameters=info.parameters,
            model_max_length=info.max_length,
            task=task,
        )
        return plan if not chosen else keep_head_rate(plan, replan({}))

    tell(link, too_long(train, lengths, replan({}).max_length))
    return replan


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
    """Trains what the plan lists, cheapest first; stops early where the budget or a cancel says so."""
    candidates: list[Candidate] = []
    for planned in run.plan.methods:
        if candidates and _must_skip(run, planned.estimated_seconds):
            left = run.seconds_left()
            message = f"{planned.method} is left out: it needs about {planned.estimated_seconds or 0:.0f} s"
            message += "" if left is None else f", {max(0.0, left):.0f} s are left"
            run.link.event("data_warning", message, {"code": "budget", "method": planned.method}, level="warn")
            continue
        try:
            candidate = METHODS[planned.method](run)
        except Cancelled as request:
            if not request.keep_best or not candidates:
                raise
            run.is_winding_down = True
            break
        peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # of this process, so far
        candidate.details["peak_mb"] = round(peak_kib * 1024 / 1e6)
        candidates.append(candidate)
        _announce(run, candidate)
        if run.is_winding_down:
            break
    return candidates


def _must_skip(run: Run, needed_s: float | None) -> bool:
    left = run.seconds_left()
    # Half of an estimate still leaves time for a useful, shorter run of a method that stops on time.
    return left is not None and left < (needed_s or 0) * 0.5


def _announce(run: Run, candidate: Candidate) -> None:
    values = run.rules.summary(candidate.validation_logits, run.validation.labels)
    data = {"method": candidate.method, "split": "validation", "values": values, "seconds": round(candidate.seconds, 2)}
    text = f"{candidate.method}: {run.plan.metric} {values[run.plan.metric]:.4f} on {len(run.validation.labels)} rows"
    run.link.event("baseline_ready" if candidate.method == "baseline" else "metrics", text, data)


def choose(candidates: Sequence[Candidate], run: Run) -> Candidate:
    """The best on validation; among equals the cheaper one, which comes first."""
    values = [run.score(candidate.validation_logits) for candidate in candidates]
    place = run.plan.deciding.best(values)
    best = candidates[place]
    run.link.set(best={"metric": run.plan.metric, "value": values[place], "method": best.method, "step": 0})
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
