"""Every family of encoders answers as transformers does, or it is said why not. docs/encoders.md has the whole matrix,
made by the same code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import families, report
from benchmarks.families import Cell
from tests.support.exports import Exports

# What no engine runs, with words of the reason.
UNSERVED = {("t5", "import"): "runs its decoder too"}
# Whose masks or positions are each of another kind: relative, rotary with windows, causal, buckets. The table of
# docs/encoders.md has the graphs of all.
EXPORTED = ("deberta-v2", "modernbert", "qwen3", "t5")


def check(cell: Cell) -> None:
    reason = UNSERVED.get((cell.family, cell.use))
    if reason is None:
        assert cell.is_equal, cell
    else:
        assert re.search(reason, cell.reason or ""), cell


@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_family_answers_as_transformers_does_in_every_use(family: str, tmp_path: Path) -> None:
    for cell in families.measure(family, tmp_path, engines=["torch"]):
        check(cell)


@pytest.mark.slow
@pytest.mark.parametrize("family", EXPORTED)
def test_so_does_its_graph_with_an_adapter(family: str, tmp_path: Path, exports: Exports) -> None:
    for cell in families.measure(family, tmp_path, engines=["onnx", "openvino"], uses=["lora"], export=exports):
        check(cell)


def test_the_table_says_what_does_not_run_and_why() -> None:
    cells = [
        Cell("bert", engine, use, *((1e-7, 0.99999) if use != "full" else (None, None, "no such operator")))
        for engine in families.ENGINES
        for use in families.USES
    ]
    text = families.table(cells)
    assert "| `bert` | onnx | 1e-07, 0.99999 | 1e-07, 0.99999 | 1e-07, 0.99999 | no (1) |" in text
    assert text.endswith("1. no such operator\n")


def test_the_page_has_the_table_of_the_latest_results() -> None:
    cells = [Cell(**row) for row in report.load()["families"]["rows"]]
    assert families.render(families.PAGE.read_text(), cells) == families.PAGE.read_text()
    for cell in cells:
        check(cell)
