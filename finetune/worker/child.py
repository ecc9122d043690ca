"""The training process: `python -m finetune.worker.child`, spoken to in JSON over its standard pipes."""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import select
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

from safetensors import SafetensorError

from finetune.jobs.failures import Cancelled, RunError, Stopped
from finetune.jobs.hyperparameters import PlanError
from finetune.jobs.link import ChildJob
from finetune.jobs.records import JobFailure
from finetune.training.pace import Pace, beating
from finetune.training.recipe import run_job
from finetune.worker.pipe_link import PipeLink
from model_registry.errors import StoreFull
from modeling.child_process import die_with_parent, private_stdout
from modeling.engines import openvino
from modeling.errors import BackboneUnavailable

_FULL = (errno.ENOSPC, errno.EDQUOT)


def main() -> int:
    """Reads the job from the first line, runs it, reports how it ended; the exit status is 0 if it could report."""
    die_with_parent()
    sink = private_stdout()
    if sys.argv[1:2] == ["--ahead"]:
        get_ready(_steps_ahead(sys.argv[2:]), is_wanted=_has_come)
    line = sys.stdin.readline()
    if not line:
        return 0  # it waited for a job, and the worker has gone
    job = ChildJob.model_validate_json(line)
    _print_to(job.log_file)
    link = PipeLink(sys.stdin, sink)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the supervisor decides
    job.work_dir.mkdir(parents=True, exist_ok=True)
    try:
        pace = Pace(elapsed_s=job.elapsed_s, percent=job.percent)
        with beating(pace, link.progress):
            run_job(job, link, pace)
    except Stopped:
        link.stopped()
    except Cancelled:
        link.cancelled()
    except Exception as error:
        link.fail(explain(error).model_dump(mode="json"))
        if not isinstance(error, RunError):
            raise  # the traceback goes to the job's log
    return 0


def explain(error: Exception) -> JobFailure:
    """A failure a person can act on, by the kind of error."""
    if isinstance(error, RunError):
        return error.failure
    if isinstance(error, PlanError):
        return JobFailure(code="invalid_hyperparameters", message=str(error), hint="fix it and submit the job again")
    if _is_disk_full(error):
        hint = "free some space, then submit the job again; nothing incomplete was registered"
        return JobFailure(code="storage_full", message="no space left for the artefact", hint=hint, retryable=True)
    if _is_out_of_memory(error):
        hint = "use a smaller batch_size or max_length"
        return JobFailure(code="out_of_memory", message="the run needs more memory than there is", hint=hint)
    if isinstance(error, BackboneUnavailable):
        return JobFailure(code="backbone_unavailable", message=str(error), hint="check the backbone's source")
    return JobFailure(
        code="internal_error",
        message=f"the run failed ({type(error).__name__})",
        hint="the worker's log has the details",
    )


def _is_disk_full(error: Exception) -> bool:
    if isinstance(error, SafetensorError):  # wraps the system's error in text: "… (os error 28)"
        return any(f"os error {number})" in str(error) for number in _FULL)
    return isinstance(error, StoreFull) or (isinstance(error, OSError) and error.errno in _FULL)


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError) or "torch" not in sys.modules:
        return isinstance(error, MemoryError)
    from finetune.training.memory import is_out_of_memory

    return is_out_of_memory(error)


def get_ready(steps: Iterable[Callable[[], object]], *, is_wanted: Callable[[], bool]) -> None:
    """One step after the other until the process is wanted: a job may need none of those that are left."""
    for step in steps:
        if is_wanted():
            return
        with contextlib.suppress(ImportError):
            step()


def _steps_ahead(model_types: Sequence[str]) -> Iterator[Callable[[], object]]:
    """Imports of what a job imports only when it gets that far, from what every job needs to what some do."""
    types = [name.replace("-", "_") for name in model_types]
    yield from _imports(
        "finetune.training.methods.linear_probe", "finetune.training.methods.baseline", "matplotlib.figure"
    )
    if openvino.is_available():
        yield openvino.import_runtime
    yield from _imports("torch", "modeling.engines.torch", "transformers.models.auto.modeling_auto")
    yield from _imports(*(f"transformers.models.{name}.modeling_{name}" for name in types))
    yield from _imports(
        "accelerate",
        "peft",
        "finetune.training.methods.lora",
        "finetune.training.methods.full",
        "finetune.training.methods.setfit",
    )


def _imports(*names: str) -> list[Callable[[], object]]:
    return [partial(importlib.import_module, name) for name in names]


def _has_come() -> bool:
    """Whether standard input holds a job, or has ended."""
    return bool(select.select([sys.stdin], [], [], 0)[0])


def _print_to(log_file: Path | None) -> None:
    """One that waited did not know its job's log yet."""
    if log_file is None:
        return
    with contextlib.suppress(OSError):  # a full disk is no reason not to train
        descriptor = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(descriptor, 2)
        os.dup2(descriptor, 1)
        os.close(descriptor)


if __name__ == "__main__":
    sys.exit(main())
