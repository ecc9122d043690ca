"""Every family of encoders answers as transformers does, on every engine and in every use, or it is said why not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import families
from modeling.ingestion import READERS
from tests.support.exports import Exports

# What no engine runs, with words of the reason.
UNSERVED = {("t5", "import"): "runs its decoder too"}


@pytest.mark.parametrize("family", sorted(READERS["text"].model_types))
def test_a_family_answers_as_transformers_does(family: str, tmp_path: Path, exports: Exports) -> None:
    for cell in families.measure(family, tmp_path, export=exports):
        reason = UNSERVED.get((cell.family, cell.use))
        if reason is None:
            assert cell.is_equal, cell
        else:
            assert re.search(reason, cell.reason or ""), cell
