"""Trials of one method inside a job, one after the other: Optuna proposes, the loop trains, weak trials end early.

Every trial has a folder of its own below the job's, and every finished one is in `trials.json`. A run
that goes on after a kill reads that file, proposes what it would have proposed, and goes on inside the
trial that was cut. The best trial's model comes from its own checkpoint, so it need not stay in memory.
"""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from finetune.jobs.failures import Cancelled, NonFiniteLoss, RunError
from finetune.jobs.plan import TrainingPlan
from finetune.jobs.search_space import Range
from finetune.training.methods import METHODS
from finetune.training.methods.candidate import Candidate
from finetune.training.run_context import Run

_FILE = "trials.json"
_REDUCTION = 3  # of ASHA: a third of the trials goes on at each rung (Li et al., 2020)
Replan = Callable[[Mapping[str, Any]], TrainingPlan]


class TrialPruned(Exception):
    """The trial is behind the others at this evaluation, and ends."""


@dataclass(slots=True)
class Trial:
    """One finished trial: `value` is the best on validation, `reports` the value by evaluation."""

    number: int
    params: dict[str, Any]
    seed: int
    state: str  # complete, pruned or failed
    value: float | None
    seconds: float
    reports: dict[int, float] = field(default_factory=dict)
    rungs: dict[str, Any] = field(default_factory=dict)
    reason: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "rungs"}


def search(run: Run, replan: Replan) -> Candidate:
    """Runs up to `run.plan.trials` trials within the budget and returns the best, whose plan becomes the run's.

    Raises `RunError` without Optuna and if no trial ends with a model, and `Cancelled` and `Stopped` as the loop does.
    """
    trials = _Trials(run, replan)
    run.pace.enter(trials.method)
    trials.load()
    while trials.may_go_on():
        trials.one()
    return trials.winner()


class _Trials:
    def __init__(self, run: Run, replan: Replan) -> None:
        self.run, self.replan = run, replan
        self.method = run.plan.methods[0].method
        self.metric = run.plan.deciding
        self.done: list[Trial] = []
        self.best: tuple[int, Candidate] | None = None
        self.optuna = _optuna()
        self.distributions = {name: _distribution(self.optuna, name, spec) for name, spec in run.plan.space.items()}
        known = self.optuna.trial.TrialState
        self.states = {"complete": known.COMPLETE, "pruned": known.PRUNED, "failed": known.FAIL}
        self.study = self._study()

    # Before and after

    def load(self) -> None:
        """Takes over what earlier attempts finished."""
        for folder in (self.run.work_dir, *self.run.earlier_work_dirs):
            try:
                entries = json.loads((folder / _FILE).read_bytes())
            except (OSError, ValueError):
                continue
            for entry in entries:
                entry["reports"] = {int(step): value for step, value in entry["reports"].items()}
                self._add(Trial(**entry))
            message = f"the search goes on after {len(self.done)} finished trials"
            self.run.link.event("resumed", message, {"method": self.method, "trials": len(self.done)})
            return

    def may_go_on(self) -> bool:
        if len(self.done) >= self.run.plan.trials or self.run.is_winding_down:
            return False
        left = self.run.seconds_left()
        if left is None or not any(trial.value is not None for trial in self.done):
            return True
        return left > 0.5 * sorted(trial.seconds for trial in self.done)[len(self.done) // 2]

    def winner(self) -> Candidate:
        best = self._best()
        if best is None:
            reasons = "; ".join(dict.fromkeys(trial.reason or trial.state for trial in self.done))
            told = f"no trial of {len(self.done)} ended with a model: {reasons}"[:500]
            raise RunError("search_failed", told, hint="narrow the space, the learning rate's first of all")
        run = self._run_of(best.number, best.params)
        candidate = self.best[1] if self.best and self.best[0] == best.number else METHODS[self.method](run)
        self.run.plan = run.plan
        candidate.details["search"] = {
            "best": best.number,
            "asked": run.plan.trials,
            "pruner": run.plan.pruner,
            "space": run.plan.model_dump(include={"space"})["space"],
            "trials": [trial.as_dict() for trial in self.done],
        }
        return candidate

    # One trial

    def one(self) -> None:
        number = len(self.done)
        # A sampler made anew for each trial proposes the same after a resumption as it would have without.
        self.study.sampler = self.optuna.samplers.TPESampler(seed=self.run.plan.seed + number, n_startup_trials=5)
        if number == 0:
            self.study.enqueue_trial(self._as_asked())
        asked = self.study.ask(self.distributions)
        trial = Trial(number, dict(asked.params), self.run.plan.seed, "complete", None, 0.0)
        run = self._run_of(number, trial.params)
        run.on_evaluation = lambda evaluation, value: self._hear(asked, trial, evaluation, value)
        started = time.monotonic()
        try:
            with run.pace.part(number, self.run.plan.trials):
                candidate = METHODS[self.method](run)
            trial.value = run.score(candidate.validation_logits)
            self._keep(trial, candidate)
        except TrialPruned:
            trial.state, trial.value = "pruned", max(trial.reports.values(), key=self.metric.gain)
        except NonFiniteLoss as error:
            trial.state, trial.reason = "failed", str(error)
        except Cancelled as request:
            if not request.keep_best or self.best is None:
                raise
            self.run.is_winding_down = True
            return
        self.run.is_winding_down |= run.is_winding_down
        trial.seconds = round(time.monotonic() - started, 3)
        trial.rungs = dict(self.study.trials[asked.number].system_attrs)
        self.done.append(trial)
        self._end(asked, trial)

    def _as_asked(self) -> dict[str, Any]:
        """The first trial is the plan without a search, as far as it is within the space."""
        plan = self.run.plan
        current = {**plan.model_dump(), **self.run.plan_of(self.method).model_dump()}
        values = {name: _nested(current, name) for name in self.distributions}
        return {
            name: value for name, value in values.items() if value is not None and _lies_in(plan.space[name], value)
        }

    def _hear(self, asked: Any, trial: Trial, evaluation: int, value: float) -> None:
        trial.reports[evaluation] = value
        asked.report(value, evaluation)
        if asked.should_prune():
            raise TrialPruned

    def _keep(self, trial: Trial, candidate: Candidate) -> None:
        """Of two models only the better stays in memory."""
        best = self._best()
        if best is None or self._gain(trial) > self._gain(best):
            self.best = (trial.number, candidate)

    def _best(self) -> Trial | None:
        """Among equals the earlier one."""
        scored = [trial for trial in self.done if trial.state == "complete" and trial.value is not None]
        return max(scored, key=lambda trial: (self._gain(trial), -trial.number), default=None)

    def _gain(self, trial: Trial) -> float:
        return self.metric.gain(trial.value or 0.0)

    def _tidy(self) -> None:
        """Of the finished trials only the best keeps its folder."""
        best = self._best()
        for trial in self.done:
            if trial is not best:
                shutil.rmtree(self._folder(self.run.work_dir, trial.number), ignore_errors=True)

    def _end(self, asked: Any, trial: Trial) -> None:
        self.study.tell(asked, trial.value if trial.state == "complete" else None, state=self.states[trial.state])
        path = self.run.work_dir / _FILE
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps([asdict(one) for one in self.done]))
        temporary.replace(path)
        value = "no value" if trial.value is None else f"{self.run.plan.metric} {trial.value:.4f}"
        message = f"trial {trial.number + 1} of {self.run.plan.trials}: {trial.state}, {value}"
        data = {"split": "validation", "method": self.method, "trial": trial.as_dict()}
        self.run.link.event("metrics", message, data)
        self._tidy()

    def _add(self, trial: Trial) -> None:
        self.done.append(trial)
        self.study.add_trial(
            self.optuna.trial.create_trial(
                state=self.states[trial.state],
                value=trial.value if trial.state != "failed" else None,
                params=trial.params,
                distributions=self.distributions,
                intermediate_values=trial.reports,
                system_attrs=trial.rungs,
            )
        )

    def _run_of(self, number: int, params: Mapping[str, Any]) -> Run:
        """The run with the trial's plan and folders; features and the loaded backbone are shared."""
        run = copy.copy(self.run)
        run.plan = self.replan(params)
        run.work_dir = self._folder(self.run.work_dir, number)
        run.earlier_work_dirs = tuple(self._folder(folder, number) for folder in self.run.earlier_work_dirs)
        return run

    def _folder(self, work_dir: Path, number: int) -> Path:
        return work_dir / "trials" / f"{number:03d}"

    def _study(self) -> Any:
        pruners = self.optuna.pruners
        pruner = pruners.NopPruner()
        if self.run.plan.pruner == "asha":
            # The resource is the number of evaluations: steps differ in size with the batch.
            pruner = pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=_REDUCTION)
        return self.optuna.create_study(direction=self.metric.direction, pruner=pruner)


def _distribution(optuna: Any, name: str, spec: Any) -> Any:
    if not isinstance(spec, Range):
        return optuna.distributions.CategoricalDistribution(list(spec))
    if name in _WHOLE:
        return optuna.distributions.IntDistribution(int(spec.low), int(spec.high), log=spec.log)
    return optuna.distributions.FloatDistribution(spec.low, spec.high, log=spec.log)


_WHOLE = frozenset({"batch_size", "gradient_accumulation", "lora.r", "lora.alpha", "early_stopping.patience"})


def _nested(values: Mapping[str, Any], name: str) -> Any:
    head, _, inner = name.partition(".")
    found = values.get(head)
    return found.get(inner) if inner and isinstance(found, dict) else found


def _lies_in(spec: Any, value: Any) -> bool:
    return spec.low <= value <= spec.high if isinstance(spec, Range) else value in spec


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise RunError(
            "search_unavailable",
            "trials needs the package optuna, which this worker lacks",
            hint="install polyhead[finetune] where the worker runs, or leave out trials",
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
