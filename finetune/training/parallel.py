"""Several processes that train together: the job's own, rank 0, and those that it starts (`finetune.training.rank`).

All take the same steps, each on its share of the rows, and Accelerate sums their gradients: over NCCL between GPUs,
over gloo between processes of a CPU. Rank 0 alone evaluates, writes checkpoints and reports. It orders each step on
the others' standard input, where they may wait for as long as it evaluates. Gradients are summed only after all have
said over gloo that their share is done: so one that ran out of memory leaves none waiting, and one that died is noticed
at once.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState

from finetune.data.options import FrozenModel
from finetune.jobs.failures import ProcessLost
from finetune.jobs.plan import TrainingPlan
from finetune.training.memory import is_out_of_memory
from finetune.training.settings import rank_environment, rank_variables
from modeling.child_process import describe_exit
from modeling.weights import IntArray

_EXCHANGE_S = 600.0  # below the `stall_s` of the supervisor, which would not say what is wrong
_ENDING_S = 5.0  # a process that fails closes its connections before it has ended
_COMMAND = (sys.executable, "-m", "finetune.training.rank")


class Assignment(FrozenModel):
    """What another process trains. `rows_file` holds the tokens and labels of the training rows, `group_file` is where
    the processes meet."""

    method: str
    plan: TrainingPlan
    labels: tuple[str, ...]
    backbone_folder: Path
    work_dir: Path
    earlier_work_dirs: tuple[Path, ...]
    rows_file: Path
    group_file: Path


def share_of(lengths: IntArray, rows: IntArray, *, rank: int, processes: int) -> IntArray:
    """The rows of a step that one process computes: dealt out by length, so that all have as much to do. The last may
    get none. One process alone keeps them in their order."""
    if processes == 1:
        return rows
    order = rows[np.argsort(-lengths[rows], kind="stable")]
    return order[rank::processes]


def seed_of(seed: int, *, rank: int, step: int) -> int:
    """The seed of another process's dropout: a function of the step, so that a resumed run needs no state of it."""
    return int(np.random.SeedSequence([seed, rank, step]).generate_state(1)[0])


def threads_of(plan: TrainingPlan) -> int:
    """How many threads each process has."""
    return max(1, plan.cpu_threads // plan.processes)


class Exchange:
    """What the processes of a training tell each other. `lost` names the one at fault if that fails."""

    def __init__(self, accelerator: Accelerator, lost: Callable[[], ProcessLost]) -> None:
        self.rank, self.processes = accelerator.process_index, accelerator.num_processes
        self._accelerator, self._lost = accelerator, lost

    def gathered(self, numbers: Sequence[float]) -> list[list[float]]:
        """The numbers of each process, by rank; all give equally many. Raises `ProcessLost`."""
        if self.processes == 1:
            return [list(numbers)]
        together = torch.zeros(self.processes, len(numbers), dtype=torch.float64)
        together[self.rank] = torch.tensor(numbers, dtype=torch.float64)
        return [list(row) for row in self._sum(together).tolist()]

    @torch.no_grad()
    def begin(self, parameters: Sequence[torch.nn.Parameter], *, step: int) -> None:
        """Give all the weights of rank 0. Raises `ProcessLost`, and `RuntimeError` if they begin at other steps."""
        if self.processes == 1:
            return
        if self.gathered([step]) != [[step]] * self.processes:
            raise RuntimeError("the processes read different checkpoints")
        together = torch.cat([parameter.reshape(-1).float() for parameter in parameters])
        together = self._sum(together if self.rank == 0 else torch.zeros_like(together))
        for parameter, part in zip(parameters, _split(together, parameters), strict=True):
            parameter.copy_(part.view_as(parameter))

    @torch.no_grad()
    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Leave the sum of all gradients in each process; a weight that no pass reached has none."""
        if self.processes == 1:
            return
        gradients = [torch.zeros_like(one) if one.grad is None else one.grad for one in parameters]
        reached = gradients[0].new_tensor([one.grad is not None for one in parameters])
        together = self._sum(torch.cat([*(gradient.reshape(-1).float() for gradient in gradients), reached.float()]))
        parts, counts = _split(together, parameters), together[-len(parameters) :].tolist()
        for parameter, part, count in zip(parameters, parts, counts, strict=True):
            parameter.grad = part.view_as(parameter).to(parameter.dtype) if count else None

    def _sum(self, tensor: torch.Tensor) -> torch.Tensor:
        try:
            total: torch.Tensor = self._accelerator.reduce(tensor, "sum")
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise self._lost() from error
        return total


def _split(together: torch.Tensor, parameters: Sequence[torch.nn.Parameter]) -> Sequence[torch.Tensor]:
    sizes = [parameter.numel() for parameter in parameters]
    return torch.split(together[: sum(sizes)], sizes)


@contextlib.contextmanager
def as_rank(rank: int, plan: TrainingPlan, group_file: Path) -> Iterator[None]:
    """Inside, Accelerate counts this process among those of the plan. They meet at a file of this host, not at a port
    that others could reach, and stay in touch until the process ends."""
    on_cpu = plan.device == "cpu"
    if not dist.is_initialized():
        dist.init_process_group(
            "gloo" if on_cpu else "cpu:gloo,cuda:nccl",
            init_method=group_file.as_uri(),
            rank=rank,
            world_size=plan.processes,
            timeout=datetime.timedelta(seconds=_EXCHANGE_S),
        )
    AcceleratorState._reset_state(reset_partial_state=True)
    with rank_variables(rank, plan.processes):
        PartialState(cpu=on_cpu)
    threads = torch.get_num_threads()
    if on_cpu:
        torch.set_num_threads(threads_of(plan))
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        AcceleratorState._reset_state(reset_partial_state=True)


class Ranks:
    """The other processes, as rank 0 sees them. They start with the first training and stay for the next ones."""

    def __init__(self, plan: TrainingPlan, *, work_dir: Path) -> None:
        self._plan, self._work_dir = plan, work_dir
        self._others: list[subprocess.Popen[str]] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._step = 0

    @contextlib.contextmanager
    def training(self, assignment: Mapping[str, Any], arrays: Mapping[str, np.ndarray[Any, Any]]) -> Iterator[None]:
        """While it is open, the others take part in the training of `assignment` (without its files) on the rows in
        `arrays`. Raises `ProcessLost`."""
        from safetensors.numpy import save_file

        folder = self._started()
        save_file(dict(arrays), folder / "rows.safetensors")
        files = {"rows_file": folder / "rows.safetensors", "group_file": folder / "group"}
        self._tell("train", Assignment.model_validate({**assignment, **files}).model_dump(mode="json"))
        with as_rank(0, self._plan, files["group_file"]):
            try:
                yield
            finally:
                with contextlib.suppress(ProcessLost):
                    self._tell("end", {})

    def order(self, step: int, factor: float) -> None:
        """Have the others take a step with this factor on the learning rates, as the caller does. Raises
        `ProcessLost`."""
        self._step = step
        self._tell("step", {"factor": factor})

    def lost(self) -> ProcessLost:
        """The failure of an exchange: by the one that has ended or is about to, else by one that hangs."""
        until = time.monotonic() + _ENDING_S
        while time.monotonic() < until:
            for rank, other in enumerate(self._others, 1):
                if other.poll() is not None:
                    return self._ended(rank)
            time.sleep(0.05)
        return self._lost(1, "gives no sign of life")

    def close(self) -> None:
        """End the others. They have nothing to save, and their imports take a while to leave."""
        if dist.is_initialized():
            dist.destroy_process_group()
        for other in self._others:
            other.kill()
            other.communicate()
        self._others = []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _started(self) -> Path:
        if self._folder is None:
            self._work_dir.mkdir(parents=True, exist_ok=True)
            self._folder = tempfile.TemporaryDirectory(prefix="processes-", dir=self._work_dir)
            for rank in range(1, self._plan.processes):
                environment = rank_environment(threads_of(self._plan), device=rank)
                self._others.append(
                    subprocess.Popen(
                        (*_COMMAND, str(rank)),
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        text=True,
                        env=environment,
                    )
                )
            for rank, other in enumerate(self._others, 1):
                assert other.stdout is not None
                if not other.stdout.readline():
                    raise self._ended(rank)
        return Path(self._folder.name)

    def _tell(self, kind: str, content: Mapping[str, Any]) -> None:
        for rank, other in enumerate(self._others, 1):
            assert other.stdin is not None
            try:
                other.stdin.write(json.dumps({"kind": kind, **content}) + "\n")
                other.stdin.flush()
            except OSError as error:
                raise self._ended(rank) from error

    def _ended(self, rank: int) -> ProcessLost:
        """What it said before it ended, or how it ended."""
        other = self._others[rank - 1]
        assert other.stdout is not None
        said = other.stdout.readline().strip()
        return self._lost(rank, said or f"ended ({describe_exit(other.wait())})")

    def _lost(self, rank: int, what: str) -> ProcessLost:
        return ProcessLost(rank, of=self._plan.processes, what=what, step=self._step)
