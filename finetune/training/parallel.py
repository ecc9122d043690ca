"""Several processes compute a step's gradient together: the `Leader` in the job's own process, a `Follower` in each of
the others (`finetune.worker.ddp_follower`).

The leader alone has the optimiser, the checkpoints, the evaluation and the line to the supervisor. In each step it
sends the weights out, every process computes the gradient of its share of the rows, and the sum comes back. What is
said goes over pipes, as lines of JSON, so a process that dies is noticed at once; weights and gradients go through
torch.distributed, NCCL between GPUs and gloo between processes of a CPU. They are exchanged only when every process has
said that its share is done: one that runs out of memory cannot leave the others waiting inside an exchange.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict
from torch._C._distributed_c10d import FileStore

from finetune.jobs.failures import ProcessLost
from finetune.jobs.plan import TrainingPlan
from finetune.training.memory import is_out_of_memory, release
from finetune.training.settings import rank_environment
from modeling.child_process import describe_exit
from modeling.weights import IntArray

_EXCHANGE_S = 300.0  # all are there when it begins
_ANSWER_S = 300.0  # and ten times what the leader's own share took
_COMMAND = (sys.executable, "-m", "finetune.worker.ddp_follower")


class Assignment(BaseModel):
    """What a follower trains with. `rows_file` holds the tokens and labels of the training rows, `group_file` is where
    the processes meet."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    method: str
    plan: TrainingPlan
    labels: tuple[str, ...]
    backbone_folder: Path
    rows_file: Path
    group_file: Path
    rank: int


@dataclass(frozen=True, slots=True)
class Order:
    """One step: its number, the most rows and tokens of a pass, and the scale of the loss where precision is fp16."""

    step: int
    rows: int
    tokens: int | None
    scale: float | None = None


@dataclass(frozen=True, slots=True)
class Share:
    """What a process found: its part of the step's loss, the sum of its rows' plain losses, its number of rows, and the
    rows whose loss is not finite."""

    loss: float
    plain: float = 0.0
    rows: int = 0
    broken: list[int] = field(default_factory=list)


def share_of(lengths: IntArray, rows: IntArray, *, rank: int, processes: int) -> IntArray:
    """The rows of a step that one process computes: dealt out by length, so that all have as much to do. The last may
    get none. One process alone keeps them in their order."""
    if processes == 1:
        return rows
    order = rows[np.argsort(-lengths[rows], kind="stable")]
    return order[rank::processes]


def seed_of(seed: int, *, rank: int, step: int) -> int:
    """Of a follower's dropout: a function of the step, so that there is nothing to save for a resumed run."""
    return int(np.random.SeedSequence([seed, rank, step]).generate_state(1)[0])


@contextlib.contextmanager
def leading(plan: TrainingPlan, work_dir: Path) -> Iterator[Leader | None]:
    """A leader where the plan has several processes; its followers are gone at the end."""
    if plan.processes == 1:
        yield None
        return
    with contextlib.closing(Leader(plan, work_dir=work_dir)) as leader:
        yield leader


class Leader:
    """This process and `processes - 1` followers, which start with the first training and stay for the next ones."""

    def __init__(self, plan: TrainingPlan, *, work_dir: Path) -> None:
        self.processes = plan.processes
        self._plan, self._work_dir = plan, work_dir
        self._followers: list[_Process] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._step = 0

    @property
    def pids(self) -> list[int]:
        return [follower.process.pid for follower in self._followers]

    @contextlib.contextmanager
    def training(self, assignment: Mapping[str, Any], arrays: Mapping[str, np.ndarray[Any, Any]]) -> Iterator[None]:
        """While it is open, the followers take part in the training of `assignment` (without its files and rank) on
        the rows in `arrays`. Raises `ProcessLost`."""
        from safetensors.numpy import save_file

        threads = torch.get_num_threads()
        folder = self._opened()
        save_file(dict(arrays), folder / "rows.safetensors")
        files = {"rows_file": folder / "rows.safetensors", "group_file": folder / "group"}
        for follower in self._followers:
            told = Assignment.model_validate({**assignment, **files, "rank": follower.rank})
            self._tell(follower, {"kind": "train", "assignment": told.model_dump(mode="json")})
        if not dist.is_initialized():
            self._answers(_ANSWER_S)  # they have started, and only then is it waited for them at the meeting point
            with self._exchange():
                join_group(self._plan.device, folder / "group", rank=0, processes=self.processes)
        self._answers(_ANSWER_S)
        if self._plan.device == "cpu":
            torch.set_num_threads(threads_of(self._plan))
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            with contextlib.suppress(ProcessLost):
                self._tell_all({"kind": "end"})

    def gradients(self, model: torch.nn.Module, order: Order, compute: Callable[[], Share]) -> list[Share]:
        """Leaves the sum of all processes' gradients in the parameters; `compute` does this process's share.

        Raises the leader's own error, `torch.OutOfMemoryError` where a follower ran out of memory, and `ProcessLost`.
        """
        self._step = order.step
        self._tell_all({"kind": "step", "order": _values(order)})
        self._answers(_ANSWER_S)  # one that hangs is found here, not by the exchange's own timeout
        with self._exchange():
            send_weights(model)
        started, shortage = time.monotonic(), None
        try:
            own = compute()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            own, shortage = Share(0.0), error
        answers = self._answers(_ANSWER_S + 10 * (time.monotonic() - started))
        short = [rank for rank, answer in enumerate(answers, 1) if answer["kind"] == "out_of_memory"]
        if shortage is not None:
            raise shortage
        if short:
            raise torch.OutOfMemoryError(f"training process {short[0]} of {self.processes} ran out of memory")
        self._tell_all({"kind": "sum"})
        with self._exchange():
            sum_gradients(model, is_leader=True)
        return [own, *(Share(**{one.name: answer[one.name] for one in fields(Share)}) for answer in answers)]

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
        for follower in self._followers:
            follower.close()
        self._followers = []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    # The followers

    def _opened(self) -> Path:
        if self._folder is None:
            self._work_dir.mkdir(parents=True, exist_ok=True)
            self._folder = tempfile.TemporaryDirectory(prefix="processes-", dir=self._work_dir)
            self._followers = [
                _Process(_COMMAND, rank, rank_environment(threads_of(self._plan), device=rank))
                for rank in range(1, self.processes)
            ]
        return Path(self._folder.name)

    def _tell_all(self, message: Mapping[str, Any]) -> None:
        for follower in self._followers:
            self._tell(follower, message)

    def _tell(self, follower: _Process, message: Mapping[str, Any]) -> None:
        try:
            follower.tell(message)
        except OSError as error:
            raise self._lost(follower) from error

    def _answers(self, seconds: float) -> list[dict[str, Any]]:
        until = time.monotonic() + seconds
        return [self._answer(follower, until) for follower in self._followers]

    def _answer(self, follower: _Process, until: float) -> dict[str, Any]:
        try:
            answer = follower.lines.get(timeout=max(0.0, until - time.monotonic()))
        except queue.Empty:
            follower.process.kill()
            raise self._lost(follower, "gives no sign of life") from None
        if answer is None:
            raise self._lost(follower)
        if answer["kind"] == "failed":
            raise self._lost(follower, f"failed ({answer['error']})")
        return answer

    @contextlib.contextmanager
    def _exchange(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            gone = next((follower for follower in self._followers if follower.has_ended()), None)
            raise self._lost(gone or self._followers[0], None if gone else "broke off an exchange") from error

    def _lost(self, follower: _Process, what: str | None = None) -> ProcessLost:
        what = what or f"ended ({describe_exit(follower.ended())})"
        return ProcessLost(follower.rank, of=self.processes, what=what, step=self._step)


class _Process:
    """A follower as the leader sees it. `lines` are its answers, and None when it has gone."""

    def __init__(self, command: Sequence[str], rank: int, environment: Mapping[str, str]) -> None:
        self.rank = rank
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=dict(environment)
        )
        self.lines: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True, name=f"rank-{rank}")
        self._reader.start()

    def tell(self, message: Mapping[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()

    def has_ended(self) -> bool:
        """Whether it has; one whose connection broke may need a moment."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=1)
        return self.process.poll() is not None

    def ended(self) -> int:
        """Its exit status, once its pipe is closed."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(timeout=5)
        self.process.kill()
        return self.process.wait()

    def close(self) -> None:
        """It has nothing to save, and its imports take a while to leave."""
        self.process.kill()
        self.process.wait()
        self._reader.join(timeout=5)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(json.loads(line))
        self.lines.put(None)


class Follower:
    """One of the other processes: takes part in the trainings that the leader assigns, until its input ends."""

    def __init__(self, source: Iterable[str], sink: IO[str]) -> None:
        self._source, self._sink = iter(source), sink
        self.rank, self.processes = 0, 1

    def assignments(self) -> Iterator[Assignment]:
        for line in self._source:
            message = json.loads(line)
            if message["kind"] != "train":
                continue  # what the leader still said to a training that it broke off
            assignment = Assignment.model_validate(message["assignment"])
            plan = assignment.plan
            self.rank, self.processes = assignment.rank, plan.processes
            if not dist.is_initialized():
                self._say({"kind": "started"})
                join_group(plan.device, assignment.group_file, rank=self.rank, processes=self.processes)
            yield assignment

    def follow(self, model: torch.nn.Module, compute: Callable[[Order], Share]) -> None:
        """Computes what it is told to until the training ends."""
        self._say({"kind": "ready"})
        for line in self._source:
            message = json.loads(line)
            if message["kind"] == "end":
                return
            if message["kind"] == "sum":
                sum_gradients(model, is_leader=False)
                continue
            self._say({"kind": "here"})
            send_weights(model)
            self._compute(Order(**message["order"]), compute)

    def fail(self, error: Exception) -> None:
        self._say({"kind": "failed", "error": f"{type(error).__name__}: {error}"[:500]})

    def _compute(self, order: Order, compute: Callable[[Order], Share]) -> None:
        try:
            self._say({"kind": "done", **_values(compute(order))})
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            release()
            self._say({"kind": "out_of_memory"})

    def _say(self, message: Mapping[str, Any]) -> None:
        self._sink.write(json.dumps(message) + "\n")
        self._sink.flush()


# What all processes do together


def join_group(device: str, file: Path, *, rank: int, processes: int) -> None:
    """They meet at a file of this host, not at a port that others could reach."""
    own: dict[str, Any] = {"backend": "gloo"}
    if device.startswith("cuda"):
        own = {"backend": "nccl", "device_id": torch.device("cuda", 0)}
    dist.init_process_group(
        **own,
        store=FileStore(str(file), processes),
        rank=rank,
        world_size=processes,
        timeout=datetime.timedelta(seconds=_EXCHANGE_S),
    )


def threads_of(plan: TrainingPlan) -> int:
    """Of each process's own."""
    return max(1, plan.cpu_threads // plan.processes)


@torch.no_grad()
def send_weights(model: torch.nn.Module) -> None:
    """The leader's trainable weights, in every process."""
    parameters = _trainable(model)
    together = torch.cat([parameter.reshape(-1).float() for parameter in parameters])
    dist.broadcast(together, src=0)
    if dist.get_rank() != 0:
        for parameter, part in _parts(parameters, together):
            parameter.copy_(part)


@torch.no_grad()
def sum_gradients(model: torch.nn.Module, *, is_leader: bool) -> None:
    """The sum of all processes' gradients, in the leader. A weight that its own pass does not reach has none."""
    parameters = _trainable(model)
    together = torch.cat([_gradient(parameter).reshape(-1).float() for parameter in parameters])
    dist.reduce(together, dst=0)
    if is_leader:
        for parameter, part in _parts(parameters, together):
            if parameter.grad is not None:
                parameter.grad.copy_(part)


def _trainable(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _parts(
    parameters: Sequence[torch.nn.Parameter], together: torch.Tensor
) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
    parts = torch.split(together, [parameter.numel() for parameter in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        yield parameter, part.view_as(parameter)


def _values(of: Order | Share) -> dict[str, Any]:
    return {name: getattr(of, name) for name in of.__slots__}
