"""The files of a checkpoint's folder, taken into a folder of our own before any of them is read.

What is taken are regular files below one root, opened once: a link that is changed meanwhile, a pipe or a device is
never read. Knows names and sizes, and nothing of what is in the files.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from modeling.errors import CheckpointRefused
from modeling.ingestion.base import MAX_JSON_BYTES

MAX_FILES = 1000
_MAX_DEPTH = 4
_TAKEN = {".json": MAX_JSON_BYTES, ".safetensors": None}


def take_folder(folder: Path, target: Path, *, root: Path, max_bytes: int) -> int:
    """Put the JSON and safetensors files of `folder` into `target` and return their bytes.

    Links are followed as far as they end below `root`. Raises `CheckpointRefused` if one does not, if a file is no
    regular one, or if there is more than a checkpoint has: `MAX_FILES` entries, or `max_bytes` in all.
    """
    total = 0
    for path in _candidates(folder):
        relative = path.relative_to(folder)
        descriptor = _open(path, relative, root.resolve())
        with os.fdopen(descriptor, "rb"):
            size = os.fstat(descriptor).st_size
            total += size
            most = _TAKEN[path.suffix]
            if most is not None and size > most:
                raise CheckpointRefused(f"{relative} has {size:,} bytes, more than {most:,}; save the checkpoint again")
            if total > max_bytes:
                raise CheckpointRefused(
                    f"the checkpoint's files have more than {max_bytes:,} bytes, for which import_memory_bytes is too "
                    "low; the operator can raise it"
                )
            place = target / relative
            place.parent.mkdir(parents=True, exist_ok=True)
            _put(descriptor, place)
    return total


def _candidates(folder: Path) -> Iterator[Path]:
    """Every file by name that could be part of a checkpoint."""
    entries, waiting = 0, [(folder, 0)]
    while waiting:
        current, depth = waiting.pop()
        with os.scandir(current) as found:
            for entry in found:
                entries += 1
                if entries > MAX_FILES:
                    raise CheckpointRefused(
                        f"the folder holds more than {MAX_FILES:,} files; leave only the checkpoint in it"
                    )
                path = Path(entry.path)
                if entry.is_dir(follow_symlinks=False):
                    if depth < _MAX_DEPTH:
                        waiting.append((path, depth + 1))
                elif path.suffix in _TAKEN:
                    yield path


def _open(path: Path, relative: Path, root: Path) -> int:
    """A descriptor of a regular file below `root`: looked at after it was opened, so that nothing can come between."""
    try:
        _check_regular(path.stat(), relative)  # to open a device may do something to it
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise CheckpointRefused(f"{relative} cannot be opened ({reason}); put a readable file there") from error
    try:
        _check_regular(os.fstat(descriptor), relative)
        if not _real_path(descriptor, path).is_relative_to(root):
            raise CheckpointRefused(f"{relative} is a link to outside of the import root; put the file itself there")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _check_regular(found: os.stat_result, relative: Path) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointRefused(f"{relative} is no regular file; put the file itself there")


def _real_path(descriptor: int, path: Path) -> Path:
    opened = Path(f"/proc/self/fd/{descriptor}")
    return opened.readlink() if opened.exists() else path.resolve()  # without /proc: what the name means now


def _put(descriptor: int, place: Path) -> None:
    """As another name of the opened file, or where there cannot be one as a copy."""
    try:
        os.link(f"/proc/self/fd/{descriptor}", place, follow_symlinks=True)
    except OSError:
        with os.fdopen(os.dup(descriptor), "rb") as source, place.open("xb") as copy:
            shutil.copyfileobj(source, copy, 16 << 20)
