"""The two text mixes, and the request bodies that carry them.

short: sentences of film reviews, mean 114 characters. long: Reuters articles, mean 590 characters, 103 tokens.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from benchmarks import datasets

MIXES = ("short", "long")
TEXTS = 512
# Common words that are one token each in BERT's vocabulary, for texts of a length known beforehand.
_WORDS = """time people year government day man world life part house course case system place end group company
party information school fact money point example state business night area water thing family head hand order side
home development week power country use council service room market problem court""".split()


def texts(mix: str, data: Path, *, count: int = TEXTS) -> list[str]:
    """The first texts of a mix: of `short.csv`, `long.jsonl` or their like in `data`, else of the public sets."""
    own = sorted(data.glob(f"{mix}.*"))
    if own:
        rows = datasets.rows(own[0])
    else:
        rows = datasets.snippet_rows(data) if mix == "short" else datasets.r8_rows(data, "test")
    return [str(row["text"]) for row in rows[:count]]


def of_length(tokens: int, *, count: int = 64) -> list[str]:
    """Texts of exactly `tokens` tokens of a BERT tokenizer, its two special ones included."""
    words = random.Random(tokens)
    return [" ".join(words.choices(_WORDS, k=tokens - 2)) for _ in range(count)]


def embedding_bodies(texts: Sequence[str], model: str, *, per_request: int = 1) -> list[bytes]:
    """Bodies of `POST /v1/embeddings`, `per_request` texts each."""
    groups = [texts[start : start + per_request] for start in range(0, len(texts), per_request)]
    return [_body({"input": list(group), "model": model}) for group in groups]


def predict_bodies(texts: Sequence[str], models: Sequence[str]) -> list[bytes]:
    """Bodies of `POST /predict`, a text each. Every model gets the same number of texts (±1), in a random order."""
    named = [models[index % len(models)] for index in range(len(texts))]
    random.Random(0).shuffle(named)
    return [_body({"model": model, "inputs": text}) for text, model in zip(texts, named, strict=True)]


def write_bodies(bodies: Sequence[bytes], target: Path) -> Path:
    """A body a line, as wrk.lua reads them."""
    target.write_bytes(b"\n".join(bodies) + b"\n")
    return target


def _body(document: object) -> bytes:
    return json.dumps(document).encode()
