"""The documentation against the code: what exists is documented, what is documented exists.

Pages are read as text: a row of a table begins with its name in backticks, an error code is a heading.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import json
import re
import subprocess
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.metrics import MetricWrapperBase
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from finetune.data.record_batches import FindingLog
from finetune.jobs.hyperparameters import NOT_YET, Hyperparameters
from finetune.worker.metrics import WorkerMetrics
from finetune.worker.settings import WorkerSettings
from model_registry.settings import RETIRED
from modeling.ingestion import READERS
from service.api.problems import _CODE_BY_STATUS, STATUS_BY_CODE, STATUS_BY_ERROR
from service.metrics import ServingMetrics
from service.settings import FOREIGN, ServingSettings
from tests.support.openapi import document

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), ROOT / "deploy" / "README.md"])
EMPTY = {None: "none", "": "empty", (): "empty"}


# Settings


def setting_fields() -> dict[str, list[Any]]:
    """Defaults by variable, one for each process that reads it."""
    found: dict[str, list[Any]] = {}
    for settings in (ServingSettings, WorkerSettings):
        for name, field in settings.model_fields.items():
            found.setdefault(f"POLYHEAD_{name.upper()}", []).append(field.get_default())
    return found


def test_every_setting_is_documented_with_its_default() -> None:
    rows = table_rows(page("settings"))
    for variable, defaults in setting_fields().items():
        assert variable in rows, f"docs/settings.md lacks {variable}"
        for default in defaults:
            assert rows[variable][1] == shown(default), f"docs/settings.md: default of {variable}"
        assert len(rows[variable][4]) > 10, f"docs/settings.md: {variable} has no meaning"


def test_no_other_setting_is_documented() -> None:
    known = set(setting_fields()) | {f"POLYHEAD_{name}" for name in FOREIGN | set(RETIRED)}
    for path in PAGES:
        named = set(re.findall(r"POLYHEAD_[A-Z0-9_]*[A-Z0-9]", path.read_text()))
        assert named <= known, f"{path.name} names settings that do not exist: {sorted(named - known)}"


def test_every_retired_setting_is_documented() -> None:
    _, _, retired = page("settings").partition("## Retired settings")
    assert set(re.findall(r"^\| `POLYHEAD_([A-Z_]+)`", retired, re.MULTILINE)) == set(RETIRED)


def test_every_setting_has_a_description() -> None:
    for settings in (ServingSettings, WorkerSettings):
        assert not [name for name, field in settings.model_fields.items() if not field.description]


# Error codes


def http_codes() -> dict[str, set[int]]:
    """Codes of HTTP answers with their statuses: mapped classes, statuses of the framework, literal problems."""
    found: dict[str, set[int]] = {}
    mapped = [*STATUS_BY_ERROR.values(), *_CODE_BY_STATUS.items()]
    literal = [arguments for call in calls_in("service", "Problem") for arguments in [first_two(call)] if arguments]
    for status, code in [*mapped, *literal]:
        found.setdefault(code, set()).add(status)
    return found


def test_every_error_code_is_documented_with_its_status() -> None:
    documented = documented_codes()
    for code, statuses in http_codes().items():
        assert code in documented, f"docs/errors.md lacks {code}"
        assert {documented[code]} == statuses, f"docs/errors.md: status of {code}"


def test_no_other_error_code_is_documented() -> None:
    unknown = set(documented_codes()) - set(http_codes())
    assert not unknown, f"docs/errors.md names codes that do not exist: {sorted(unknown)}"


def test_pages_name_codes_with_their_status() -> None:
    codes = http_codes()
    for path in PAGES:
        for status, code in re.findall(r"\b([45]\d\d) `([a-z]+(?:_[a-z]+)*)`", path.read_text()):
            assert int(status) in codes.get(code, set()), f"{path.name} names {status} {code}"


def test_every_code_has_its_status_in_one_table() -> None:
    assert {code: {status} for code, status in STATUS_BY_CODE.items()} == http_codes()


def test_problem_codes_are_literals() -> None:
    """Otherwise the walk above would miss some. `problems` itself computes them from the mapped ones."""
    for path in python_files("service"):
        if path.name == "problems.py":
            continue
        for call in calls(path, "Problem"):
            assert first_two(call), f"{path}:{call.lineno}"


def test_codes_of_failed_jobs_are_documented() -> None:
    codes = {code for call in calls_in("finetune", "JobFailure") for code in keyword_texts(call, "code")}
    for call in calls(ROOT / "finetune" / "jobs" / "failures.py", "__init__"):  # of a `RunError`: code, message
        codes |= {first_text(call)} if len(call.args) > 1 else set()
    codes |= {first_text(call) for call in calls_in("finetune", "RunError")}
    assert set(table_rows(section(page("errors"), "Failed jobs"))) == codes


def test_codes_of_findings_are_documented() -> None:
    codes = {code for call in calls_in("finetune/data") for code in keyword_texts(call, "code")}
    codes |= {first_text(call) for call in calls_in("finetune/data", "_finding")}
    codes |= {inspect.signature(FindingLog.note).parameters["code"].default}
    assert set(table_rows(section(page("errors"), "Findings"))) == codes


# Metrics


def metrics_of(holder: object) -> dict[str, tuple[str, ...]]:
    """Type and labels by full name."""
    found = {}
    for metric in vars(holder).values():
        if isinstance(metric, MetricWrapperBase):
            suffix = "_total" if metric._type == "counter" else ""
            found[metric._name + suffix] = (metric._type, *metric._labelnames)
    return found


def test_every_metric_is_documented_with_its_type_and_labels() -> None:
    text = page("metrics")
    for heading, holder in (("Serving", ServingMetrics()), ("Worker", WorkerMetrics())):
        documented = {
            name: (cells[1], *re.findall(r"`([a-z_]+)`", cells[2]))
            for name, cells in table_rows(section(text, heading)).items()
        }
        assert documented == metrics_of(holder)


def test_no_page_names_another_metric() -> None:
    known = {*metrics_of(ServingMetrics()), *metrics_of(WorkerMetrics())}
    for path in PAGES:
        for name in set(re.findall(r"\bpolyhead_[a-z_]+[a-z]\b", path.read_text())):
            assert re.sub("_(bucket|sum|count)$", "", name) in known, f"{path.name} names {name}"


# Hyperparameters


def hyperparameters() -> dict[str, Any]:
    """Defaults by name; nested ones with a dot."""
    found: dict[str, Any] = {}
    for name, field in Hyperparameters.model_fields.items():
        default = field.get_default()
        if isinstance(default, BaseModel):
            found |= {f"{name}.{inner}": getattr(default, inner) for inner in type(default).model_fields}
        else:
            found[name] = default
    return found


def test_every_hyperparameter_is_documented_with_its_default() -> None:
    documented = {name: cells[1] for name, cells in table_rows(page("hyperparameters")).items()}
    assert documented == {name: shown(value, none="`null`") for name, value in hyperparameters().items()}


def test_what_is_not_available_yet_is_listed() -> None:
    listed = set(re.findall(r"`([a-z_]+)`", section(page("hyperparameters"), "Not available yet").split(".")[0]))
    assert listed == NOT_YET


# Encoders


def test_every_family_of_encoders_is_documented() -> None:
    assert set(table_rows(section(page("encoders"), "Model types"))) == READERS["text"].model_types


def test_the_table_of_engines_has_every_family_on_every_engine() -> None:
    """Made by `python -m benchmarks families` as a whole."""
    text = section(page("encoders"), "Engines and uses")
    found = re.findall(r"^\| `([\w-]+)` \| (\w+) \|", text, re.MULTILINE)
    assert sorted(found) == sorted(itertools.product(READERS["text"].model_types, ("torch", "onnx", "openvino")))


# Routes


def test_every_route_is_documented() -> None:
    routes = {f"{method.upper()} {path}" for path, item in document()["paths"].items() for method in item}
    assert set(table_rows(section(page("api"), "Routes"))) == routes


def test_every_route_has_a_summary() -> None:
    operations = [operation for item in document()["paths"].values() for operation in item.values()]
    assert operations and all(operation.get("summary") for operation in operations)


# Links, paths, the tree


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(path.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        assert found.exists(), f"{path.name} links to {target}, which does not exist"
        if anchor:
            assert anchor in anchors(found), f"{path.name} links to {target}, but there is no such heading"


def test_readme_tree_names_every_folder_and_no_other() -> None:
    text = (ROOT / "README.md").read_text()
    listed = set(re.findall(r"^(\S+)/ {2,}\S", section(text, "The tree"), re.MULTILINE))
    assert {folder for folder in listed if not (ROOT / folder).is_dir()} == set()
    assert listed == top_level_folders()


def top_level_folders() -> set[str]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        files = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return {file.split("/")[0] for file in files if "/" in file and (ROOT / file).exists()}


def test_make_targets_in_the_pages_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path in PAGES:
        named = set(re.findall(r"`make ([a-z]+)", path.read_text()))
        assert named <= targets, f"{path.name}: make {sorted(named - targets)}"


def test_shell_examples_parse() -> None:
    for path in PAGES:
        for number, block in enumerate(re.findall(r"^```sh\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)):
            checked = subprocess.run(["bash", "-n"], input=block, text=True, capture_output=True, check=False)
            assert checked.returncode == 0, f"{path.name}, block {number}: {checked.stderr}"


def test_json_examples_parse() -> None:
    for path in PAGES:
        for block in re.findall(r"^```json\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL):
            json.loads(block)


def test_decisions_are_numbered_in_order_and_complete() -> None:
    decisions = sorted((DOCS / "adr").glob("*.md"))
    assert [path.name[:4] for path in decisions] == [f"{number:04d}" for number in range(1, len(decisions) + 1)]
    for path in decisions:
        text = path.read_text()
        assert text.startswith(f"# {int(path.name[:4])}. ")
        for part in ("Context", "Choice", "Cost", "What would change our mind"):
            assert f"**{part}.**" in text, f"{path.name} lacks {part}"


# Reading pages


def page(name: str) -> str:
    return (DOCS / f"{name}.md").read_text()


def section(text: str, heading: str) -> str:
    """What stands below a second-level heading."""
    _, found, rest = text.partition(f"\n## {heading}\n")
    assert found, f"there is no section {heading!r}"
    return rest.partition("\n## ")[0]


def table_rows(text: str) -> dict[str, list[str]]:
    """Cells by the first one, of rows that begin with a name in backticks."""
    rows = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        match = re.fullmatch(r"`([^`]+)`", cells[0]) if line.startswith("|") else None
        if match:
            assert match[1] not in rows, f"{match[1]} is documented twice"
            rows[match[1]] = [cells[0], *cells[1:]]
    return rows


def documented_codes() -> dict[str, int]:
    """Status by code, from the headings of the codes and the first words below them."""
    found = re.findall(r"^### (\w+)\n\n\*\*(\d{3})\.\*\* \S", section(page("errors"), "Codes"), re.MULTILINE)
    headings = re.findall(r"^### (.+)$", section(page("errors"), "Codes"), re.MULTILINE)
    assert headings == sorted(code for code, _ in found)
    return {code: int(status) for code, status in found}


def shown(value: Any, *, none: str = "none") -> str:
    """A default as a table shows it."""
    assert value is not PydanticUndefined
    if value is None:
        return none
    if value in ("", ()):
        return EMPTY[value]
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, float):
        return f"`{value:g}`"
    return f"`{json.dumps(value)}`" if isinstance(value, dict | list) else f"`{value}`"


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(path: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", without_code(path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# Reading code


def python_files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def calls_in(folder: str, name: str | None = None) -> list[ast.Call]:
    return [call for path in python_files(folder) for call in calls(path, name)]


def calls(path: Path, name: str | None = None) -> list[ast.Call]:
    """Calls of a function or method by its last name; without a name, all."""
    found = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    return [call for call in found if name is None or _called(call) == name]


def _called(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def first_text(call: ast.Call) -> str:
    value = call.args[0].value if isinstance(call.args[0], ast.Constant) else None
    assert isinstance(value, str), f"line {call.lineno}: the code is not a literal"
    return value


def first_two(call: ast.Call) -> tuple[int, str] | None:
    """Status and code where both are literals."""
    values = [argument.value if isinstance(argument, ast.Constant) else None for argument in call.args[:2]]
    if len(values) == 2 and isinstance(values[0], int) and isinstance(values[1], str):
        return values[0], values[1]
    return None


def keyword_texts(call: ast.Call, name: str) -> list[str]:
    values = [item.value for item in call.keywords if item.arg == name]
    return [value.value for value in values if isinstance(value, ast.Constant) and isinstance(value.value, str)]
