"""Rows for engines, made without much ado: tokenised texts, and rows of given ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from modeling.inputs import Features, single
from modeling.inputs.text import TextInput, TextPreprocessor


def encoded_texts(folder: Path, texts: Sequence[TextInput], *, limit: int) -> list[Features]:
    """Texts by the tokenizer of a checkpoint's folder, one row each."""
    return single(TextPreprocessor(folder, limit=limit).encode(texts))


def row_of(ids: Any, *, types: Any = None) -> Features:
    """A row of these token ids."""
    ids = np.asarray(ids, dtype=np.int64)
    return Features({"input_ids": ids, "token_type_ids": np.zeros_like(ids) if types is None else types}, len(ids))
