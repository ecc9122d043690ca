"""What must never change between two releases: on which side a row falls, what its row hash is, and under which key its
vector is kept. Another value would mix what was trained on with what is tested on, or compute every vector again."""

from __future__ import annotations

import random
from hashlib import blake2b
from pathlib import Path

import pytest

from finetune.data.canonical import canonical_writer
from finetune.data.load import load_sides
from finetune.data.options import Columns, SplitOptions
from finetune.data.record_batches import RowBatch
from finetune.training import feature_cache
from finetune.training.feature_cache import content_key, counts_space, space_name
from modeling.inputs.text import Text

WORDS = "der Straße FILM ﬁne naïve 良い 映画 plot dull good and was the a of 2024 ¿qué".split()
EXAMPLE = "  Straße ﬁne\n NAÏVE 映画\ud83d "


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 rows: texts of three scripts, copies that differ in case and blanks, near duplicates of long texts."""
    draw = random.Random(13)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(1, 30))) for _ in range(300)]
    texts += [f"  {text.swapcase()}\t" for text in texts[:50]] + [f"{text} indeed" for text in texts[50:100]]
    labels = [draw.choice("xxxxyyz") for _ in texts]
    groups = [draw.choice([None, *"abcdefghijkl"]) for _ in texts]
    path = tmp_path_factory.mktemp("identity") / "rows.parquet"
    with canonical_writer(path, ["text", "label", "who"]) as writer:
        writer.write(RowBatch(list(range(1, 401)), [list(texts), list(labels), list(groups)]))
    return path


@pytest.mark.parametrize(
    ("strategy", "counts", "digest"),
    [
        ("hash", (286, 58, 56), "eb3ca1c97b58da32"),
        ("random", (280, 60, 60), "c8c645a6c3c7afc4"),
        ("stratified", (280, 60, 60), "084b8917764dfc8d"),
        ("group", (207, 100, 38), "407c88f496b9d021"),
    ],
)
def test_rows_fall_on_the_sides_that_they_always_fell_on(
    table: Path, strategy: str, counts: tuple[int, int, int], digest: str
) -> None:
    column = {"group_column": "who"} if strategy == "group" else {}
    options = SplitOptions.model_validate({"strategy": strategy, **column})
    sides = load_sides({"train": table}, columns=Columns(), options=options, seed=7)
    numbers = [side.row_numbers.tolist() for side in (sides.train, sides.validation, sides.test)]
    found = blake2b(repr(numbers).encode(), digest_size=8).hexdigest()
    assert (tuple(map(len, numbers)), found) == (counts, digest)


def test_digests_and_keys_of_vectors_are_what_they_always_were() -> None:
    """Row hashes are the digests' first halves."""
    text = Text()
    assert text.digest(EXAMPLE).hex() == text.digest(EXAMPLE.lower()).hex() == "2936ff2534881f4fce01567adafea31f"
    assert [content_key(text.content(EXAMPLE), cut_at=cut).hex() for cut in (None, 128)] == [
        "def66c8b00a5a31358a4e4b52ca6b6bb",
        "f46dba47eda5f1f9496dd346f4cfabbc",
    ]


def test_vectors_are_kept_in_the_folders_that_they_were_always_kept_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_cache, "_version", lambda name: f"{name} 1")
    assert space_name("digest", "torch/fp32", Text.libraries) == "9792275fb2283ad2664ce1009709e182"
    assert space_name("digest", "onnx/int8", Text.libraries) == "d7859716549186bc3bdcb809443febbf"
    assert counts_space("lengths", "digest", Text.libraries) == "5e1f38f4b06a04b5663c122f4da13926"
