"""Checkpoints of others are read in a process of their own, with limits on its memory, time and files.

`import_classifier` and `ingest` are the side of the process that serves or trains, which reads nothing of a checkpoint
but its bytes; `python -m modeling.intake` is the other side. What comes out of it is safetensors and JSON of ours, and
a tokenizer that was audited.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from model_registry.errors import RegistryError, StoreFull
from model_registry.store import FileStore, space_errors
from modeling import backbone
from modeling.assemble import GoldenRow, write_version_files
from modeling.child_process import ChildFailed, ask, die_with_parent, limit_self, private_stdout, step_back
from modeling.engines.protocol import EngineBatch
from modeling.errors import CheckpointRefused, ModelingError
from modeling.ingestion import READERS, modality_of, read_config
from modeling.ingestion.taking import take_folder
from modeling.inputs import open_preprocessor, single

_log = logging.getLogger("modeling.intake")
# What a process may have for itself: interpreter, libraries and tokenizer, and a multiple of what the files have. They
# are read twice, written once, and half precision doubles.
_BASE_BYTES, _TIMES_FILES = 2 << 30, 8
_THREADS = 2
_TURN_FILE, _LOOK_S = ".reading", 0.2
_GOLDEN_TEXTS = (
    "It works.",
    "This is not what I expected at all.",
    "The quick brown fox jumps over the lazy dog.",
    "Shares rose 3.5 % after the company reported its results.",
    "Where can I find the manual?",
    "I would recommend it to anyone who asks.",
    "a",
    "One two three four five six seven eight nine ten.",
)


@dataclass(frozen=True, slots=True)
class IntakeLimits:
    """For one checkpoint. A small one gets less memory than `memory_bytes`."""

    memory_bytes: int
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Imported:
    """What a classifier turned out to be."""

    task: str
    labels: tuple[str, ...]


def import_classifier(
    folder: Path | None,
    target: Path,
    *,
    name: str,
    source: str,
    root: Path | None,
    offline: bool,
    limits: IntakeLimits,
    stop: threading.Event | None = None,
) -> Imported:
    """Write the files of a version into `target`, but for its card: encoder, head, labels and golden rows.

    `folder` is below `root`; without one, `source` is found on the hub. Raises `modeling.errors`, `CheckpointRefused`
    also if a limit is exceeded, and `ChildFailed` if `stop` is set meanwhile.
    """
    request = {"target": str(target.resolve()), "name": name, "source": source, "offline": offline}
    if folder is not None and root is not None:
        request |= {"folder": str(folder), "root": str(root.resolve())}
    found = _ask("import", request, limits, stop)
    return Imported(found["task"], tuple(found["labels"]))


def ingest(
    store: FileStore,
    source: str,
    *,
    name: str,
    offline: bool,
    limits: IntakeLimits,
    stop: threading.Event | None = None,
) -> backbone.Backbone:
    """`modeling.backbone.ingest` of what `source` names. One that is known already is only hashed."""
    folder = backbone.locate(source, offline=offline)
    if (known := backbone.find_ingested(store, folder, name=name, source=source)) is not None:
        return known
    request = {"folder": str(folder.resolve()), "store": str(store.root.resolve()), "name": name, "source": source}
    with _turn(store.root / _TURN_FILE, stop):
        if backbone.find_ingested(store, folder, name=name, source=source) is None:
            _ask("ingest", request, limits, stop)
    return backbone.ingest(store, folder, name=name, source=source)


@contextlib.contextmanager
def _turn(path: Path, stop: threading.Event | None) -> Iterator[None]:
    """Let the processes of this host read backbones one after another: a server and a worker start together, and the
    second finds what the first has read. A filesystem without locks costs the reading twice."""
    with space_errors("the store"):
        file = path.open("ab")
    with file:
        with contextlib.suppress(OSError):
            while not _is_locked(file) and not (stop is not None and stop.is_set()):
                time.sleep(_LOOK_S)
        yield  # the lock goes with the file


def _is_locked(file: BinaryIO) -> bool:
    """Whether it is ours now. Raises `OSError` if there are no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _ask(what: str, request: dict[str, Any], limits: IntakeLimits, stop: threading.Event | None) -> dict[str, Any]:
    message = {"what": what, "limits": asdict(limits), **request}
    try:
        found = ask("modeling.intake", message, timeout_s=limits.timeout_s, stop=stop)
    except ChildFailed as error:
        if error.cause == "stopped":
            raise
        _log.warning(f"a checkpoint was not read: {error}\n{error.said}", extra={"action": "intake_failed"})
        raise _refusal(error, limits) from error
    if "error" in found:
        raise _error(found)
    return found


def _refusal(error: ChildFailed, limits: IntakeLimits) -> CheckpointRefused:
    if error.cause == "time":
        return CheckpointRefused(
            f"reading the checkpoint took more than {limits.timeout_s:g} s; check its tokenizer.json, or let the "
            "operator raise import_timeout_s"
        )
    if error.cause == "memory":
        return CheckpointRefused(
            f"reading the checkpoint takes more memory than {_BASE_BYTES:,} bytes and {_TIMES_FILES} times its files, "
            f"or than {limits.memory_bytes:,} bytes; check its tokenizer.json, or let the operator raise "
            "import_memory_bytes"
        )
    return CheckpointRefused(
        f"reading the checkpoint ended the process that read it ({error}); check its tokenizer.json, and save it again "
        "with a current version"
    )


def _error(found: dict[str, Any]) -> Exception:
    """The error of the other side by its class."""
    known: list[type[Exception]] = [StoreFull, *ModelingError.__subclasses__()]
    kinds = {kind.__name__: kind for kind in known}
    return kinds.get(found["error"], CheckpointRefused)(found["message"])


def _import(request: dict[str, Any], allow: Callable[[int], None]) -> dict[str, Any]:
    if "folder" in request:
        folder, root = Path(request["folder"]), Path(request["root"])
    else:
        folder = backbone.locate(request["source"], offline=request["offline"])
        root = folder.parents[1]  # the hub's cache keeps files under their digests, and links to them
    target = Path(request["target"])
    with tempfile.TemporaryDirectory(prefix="taken-", dir=target.parent) as temporary:
        taken = Path(temporary) / folder.name  # which messages name
        taken.mkdir()
        allow(take_folder(folder, taken, root=root, max_bytes=request["limits"]["memory_bytes"] // 2))
        for name in backbone.OWN_FILES:
            (taken / name).unlink(missing_ok=True)
        _check_files(taken)
        return _write_version(taken, target, name=request["name"], source=request["source"])


def _write_version(taken: Path, target: Path, *, name: str, source: str) -> dict[str, Any]:
    import torch

    from modeling import checkpoints
    from modeling.engines.torch import TorchEngine

    torch.set_num_threads(_THREADS)
    parts = checkpoints.import_classifier(taken, target / "full", name=name, source=source)
    rows = single(open_preprocessor(parts.backbone).encode(_GOLDEN_TEXTS))
    by_position = parts.task.needs == "states"
    computed = TorchEngine(parts.backbone).run(EngineBatch(rows, states=range(len(rows)) if by_position else ()))
    values = [computed.states[row] if by_position else computed.pooled[row] for row in range(len(rows))]
    logits = [parts.head.logits(own) for own in values]
    write_version_files(
        target,
        head=parts.head,
        labels=parts.labels,
        max_length=parts.backbone.info.max_length,
        temperature=1.0,
        golden=[GoldenRow(text, row.tolist()) for text, row in zip(_GOLDEN_TEXTS, logits, strict=True)],
        task=parts.task.name,
    )
    return {"task": parts.task.name, "labels": parts.labels}


def _ingest(request: dict[str, Any], allow: Callable[[int], None]) -> dict[str, Any]:
    folder = Path(request["folder"])
    allow(sum(path.stat().st_size for path in backbone.weight_files(folder) if path.is_file()))
    _check_files(folder)
    import torch

    torch.set_num_threads(_THREADS)
    backbone.ingest(FileStore(Path(request["store"])), folder, name=request["name"], source=request["source"])
    return {}


def _check_files(folder: Path) -> None:
    """Refuse what needs no torch, whose import takes seconds."""
    READERS[modality_of(read_config(folder))].check_files(folder)


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    limits = IntakeLimits(**request["limits"])

    def allow(files_bytes: int) -> None:
        memory = min(limits.memory_bytes, _BASE_BYTES + _TIMES_FILES * files_bytes)
        limit_self(memory_bytes=memory, cpu_s=_THREADS * limits.timeout_s, file_bytes=limits.memory_bytes)

    allow(limits.memory_bytes)
    try:
        with space_errors("the checkpoint"):
            return {"import": _import, "ingest": _ingest}[request["what"]](request, allow)
    except (ModelingError, RegistryError) as error:
        return {"error": type(error).__name__, "message": str(error)}


def main() -> None:
    die_with_parent()
    request, out = json.loads(sys.stdin.readline()), private_stdout()
    if request["what"] == "import":  # a backbone is waited for by a server that answers nothing yet
        step_back()
    print(json.dumps(_answer(request)), file=out, flush=True)


if __name__ == "__main__":
    main()
