"""Checkpoints made to harm the process that reads them; all else of them is as `write_tiny_checkpoint` writes it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from modeling.testing import write_tiny_checkpoint

LABELS = ["bad", "good", "mixed"]
Tokenizer = dict[str, Any]


def write(folder: Path, change: Callable[[Tokenizer], None], **config: Any) -> Path:
    """A classifier whose `tokenizer.json` was changed."""
    write_tiny_checkpoint(folder, labels=LABELS, **config)
    return change_tokenizer(folder, change)


def change_tokenizer(folder: Path, change: Callable[[Tokenizer], None]) -> Path:
    path = folder / "tokenizer.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    return folder


def change_config(folder: Path, **values: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


def replacing(pattern: dict[str, str], content: str, *, times: int = 1) -> Callable[[Tokenizer], None]:
    """Steps one after the other in the normaliser."""

    def change(document: Tokenizer) -> None:
        step = {"type": "Replace", "pattern": pattern, "content": content}
        document["normalizer"] = {"type": "Sequence", "normalizers": [step] * times}

    return change


def bomb(*, before: str = "") -> Callable[[Tokenizer], None]:
    """Each step doubles a text, or a letter, by a pattern that takes up nothing: what a step holds does not show how
    much it makes."""
    return replacing({"Regex": f"(?={before or '.'})"}, before or "a", times=40)


def splitting(pattern: str) -> Callable[[Tokenizer], None]:
    def change(document: Tokenizer) -> None:
        step = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [step, document["pre_tokenizer"]]}

    return change


def adding(*tokens: str, first_id: int) -> Callable[[Tokenizer], None]:
    def change(document: Tokenizer) -> None:
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
        document["added_tokens"] += [
            {"id": first_id + place, "content": token, **flags} for place, token in enumerate(tokens)
        ]

    return change
