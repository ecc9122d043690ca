"""Texts and request bodies of the mixes, from files that are there already."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

from benchmarks import datasets, mixes


def test_public_sets_are_used_where_they_are_there(tmp_path: Path) -> None:
    (tmp_path / "movie-snippets.csv").write_text('text,score\n"good, and funny",2.5\ndull,-1\n')
    rows = [json.dumps({"text": text, "label": "earn"}) for text in ("profit rose", "profit fell")]
    (tmp_path / "reuters-r8-test.jsonl.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    assert mixes.texts("short", tmp_path) == ["good, and funny", "dull"]
    assert mixes.texts("long", tmp_path, count=1) == ["profit rose"]


def test_a_file_of_ones_own_takes_a_mixes_place(tmp_path: Path) -> None:
    (tmp_path / "movie-snippets.csv").write_text("text,score\npublic,1\n")
    (tmp_path / "short.jsonl").write_text('{"text": "mine"}\n')
    assert mixes.texts("short", tmp_path) == ["mine"]


def test_bodies_hold_every_text_once() -> None:
    bodies = [json.loads(body) for body in mixes.embedding_bodies(list("abcde"), "minilm", per_request=2)]
    assert [body["input"] for body in bodies] == [["a", "b"], ["c", "d"], ["e"]]
    assert {body["model"] for body in bodies} == {"minilm"}


def test_models_get_equal_shares_of_the_same_texts() -> None:
    texts = [str(number) for number in range(512)]
    bodies = [json.loads(body) for body in mixes.predict_bodies(texts, [f"m{number}" for number in range(100)])]
    assert [body["inputs"] for body in bodies] == texts
    assert set(Counter(body["model"] for body in bodies).values()) == {5, 6}
    assert mixes.predict_bodies(texts, ["a", "b"]) == mixes.predict_bodies(texts, ["a", "b"])


def test_a_body_is_a_line(tmp_path: Path) -> None:
    file = mixes.write_bodies(mixes.embedding_bodies(["two\nlines", "one"], "m"), tmp_path / "bodies")
    assert [json.loads(line)["input"] for line in file.read_text().splitlines()] == [["two\nlines"], ["one"]]


def test_scored_texts_become_a_binary_task(tmp_path: Path) -> None:
    (tmp_path / "scored.csv").write_text("text,score\nbad,-1.5\nneither,0\ngood,0.1\n")
    target = datasets.snippets(tmp_path / "scored.csv", tmp_path / "labelled.csv")
    assert datasets.rows(target) == [
        {"text": "bad", "label": "negative"},
        {"text": "good", "label": "positive"},
    ]
