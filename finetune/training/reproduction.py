"""Whether a rerun gave the same weights as the job that it repeats, to the byte, and what differs between the two runs.

The same rows, seed, plan, library versions, processor, engine and number of threads give the same bytes on a CPU. Each
of these is recorded with every evaluation, and so are the digests of the weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.jobs.link import Original
from model_registry.manifest import sha256_hex
from modeling.backbone import GRAPHS_FOLDER

_WEIGHTS = ("head.safetensors", "baseline.safetensors", "vocabulary.json", "adapter/*", "full/*")
_MOST_TOLD = 5


def weight_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a version's folder that carries weights, by its path. Graphs are made from them."""
    found = {path for pattern in _WEIGHTS for path in folder.glob(pattern) if path.is_file()}
    names = {path.relative_to(folder).as_posix(): path for path in found if GRAPHS_FOLDER not in path.parts}
    return {name: sha256_hex(names[name].read_bytes()) for name in sorted(names)}


def comparison(original: Original, evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """`is_equal` (None if the original recorded no weights), each file's outcome, and what differs between the runs."""
    before, now = original.recorded("weights"), evaluation["weights"]
    files = {} if not before else {name: _outcome(name, before, now) for name in sorted({*before, *now})}
    is_equal = None if not files else set(files.values()) == {"equal"}
    differences = list(_differences(original, evaluation))
    return {
        "of": original.job_id,
        "is_equal": is_equal,
        "files": files,
        "differences": differences,
        "message": _told(original.job_id, is_equal, files, differences),
    }


def _outcome(name: str, before: Mapping[str, str], now: Mapping[str, str]) -> str:
    if name not in before:
        return "new"
    if name not in now:
        return "missing"
    return "equal" if before[name] == now[name] else "differs"


def _differences(original: Original, evaluation: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What was recorded of both runs and is not the same."""
    for name in ("chosen", "cut_short"):
        yield from _unequal(name, original.recorded(name), evaluation.get(name))
    yield from _unequal("methods", original.methods, [one["method"] for one in evaluation["methods"]])
    yield from _unequal_entries("environment", original.recorded("environment") or {}, evaluation["environment"])


def _unequal_entries(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for key in sorted({*before, *now}):
        one, other = before.get(key), now.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from _unequal_entries(f"{name}.{key}", one, other)
        else:
            yield from _unequal(f"{name}.{key}", one, other)


def _unequal(name: str, before: Any, now: Any) -> Iterator[dict[str, Any]]:
    if _as_json(before) != _as_json(now):
        yield {"what": name, "then": before, "now": now}


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _told(of: str, is_equal: bool | None, files: Mapping[str, str], differences: Sequence[Mapping[str, Any]]) -> str:
    if is_equal is None:
        return f"{of} recorded no digests of its weights, so they cannot be compared."
    if is_equal:
        return f"The weights are equal to those of {of}, byte by byte: {', '.join(files)}."
    unequal = [f"{name} {outcome}" for name, outcome in files.items() if outcome != "equal"]
    text = f"The weights are not those of {of}: {', '.join(unequal[:_MOST_TOLD])}. "
    if not differences:
        return text + "Nothing that is recorded differs between the two runs."
    shown = [f"{one['what']} ({one['then']}, now {one['now']})" for one in differences[:_MOST_TOLD]]
    return text + f"Between the runs differ: {'; '.join(shown)}."
