"""The environment that a training process gets: what its libraries need, and no secret of the service."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator


def child_environment(threads: int) -> dict[str, str]:
    """The training process sees no service settings or secrets, only what its libraries need."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("POLYHEAD_")}
    # Processes that train together speak to each other on this host alone.
    here = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    return here | kept | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


def rank_environment(threads: int, *, device: int) -> dict[str, str]:
    """Of another process of a run, which sees only the `device`th of the GPUs that the first one sees."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    devices = [name for name in visible.split(",") if name] or [str(number) for number in range(device + 1)]
    alone = {"CUDA_VISIBLE_DEVICES": devices[device]} if device < len(devices) else {}
    return child_environment(threads) | alone


@contextlib.contextmanager
def rank_variables(rank: int, processes: int) -> Iterator[None]:
    """Inside, the environment says which of several processes this is, as Accelerate reads it."""
    before = dict(os.environ)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    os.environ |= {"OMP_NUM_THREADS": "1"} | before | {name: str(value) for name, value in place.items()}
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= before
