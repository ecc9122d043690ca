"""A tokenizer that would hold up, blow up or end the process that reads texts with it is refused before it serves."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from modeling.errors import BackboneUnavailable, CheckpointRefused, ModelingError
from modeling.ingestion import text_audit
from modeling.ingestion.text_audit import audit
from modeling.testing import write_tiny_checkpoint
from tests.support.hostile import adding, change_config, change_tokenizer, replacing, splitting

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
LLAMA3 += r"|\s+(?!\S)|\s+"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_checkpoint(tmp_path / "tiny")


def check(folder: Path) -> None:
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    audit(folder, limit=64, vocabulary=size, types=2)


def byte_level(pattern: str) -> Tokenizer:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE({letter: place for place, letter in enumerate(sorted(alphabet))}, []))
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def unigram() -> Tokenizer:
    pieces = [("<unk>", 0.0), *((letter, -2.0) for letter in "▁abcdefghijklmnopqrstuvwxyz0123456789.,")]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer


@pytest.mark.parametrize(
    "make", [None, lambda: byte_level(GPT2), lambda: byte_level(LLAMA3), unigram], ids=["bert", "gpt2", "llama3", "xlm"]
)
def test_tokenizers_of_published_kinds_pass(folder: Path, make: Callable[[], Tokenizer] | None) -> None:
    if make is not None:
        make().save(str(folder / "tokenizer.json"))
        change_config(folder, vocab_size=300)
    check(folder)


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$",
        "(x+x+)+y",
        r"(\w+\s?)+$",
        "(a|aa)+$",
        r"(\d+)*:",
        r"\s+$",
        "(.*)*;",
        r"(-|--)+\|",
        r"^(([a-z])+.)+[A-Z]$",
        r"(\x{451}+)+$",
        r"(\x62+)+$",
        r"(\u0451+)+$",
        r"\p{Greek}+$",
    ],
)
def test_patterns_that_try_again_and_again_are_refused(folder: Path, pattern: str) -> None:
    change_tokenizer(folder, splitting(pattern))
    change_tokenizer(folder, lambda document: document.update(normalizer=None))  # BERT's leaves no line ends
    with pytest.raises(CheckpointRefused, match=r"tokenizer\.json.*repeated"):
        check(folder)


def test_replacements_one_inside_another_are_refused_before_they_run(folder: Path) -> None:
    change_tokenizer(folder, replacing({"String": "a"}, "aa", times=40))
    with pytest.raises(CheckpointRefused, match=r"normalizer can make a text 1\.1e\+12 times as long"):
        check(folder)
    change_tokenizer(folder, replacing({"Regex": "."}, "a" * 900, times=3))
    with pytest.raises(CheckpointRefused, match="times as long"):
        check(folder)


def mapping_to(text: bytes) -> Callable[[dict[str, Any]], None]:
    """A table of sentencepiece: the size of its trie, the trie, and the texts that it points to."""
    table = base64.b64encode((1024).to_bytes(4, "little") + bytes(1024) + text + b"\0").decode()

    def change(document: dict[str, Any]) -> None:
        document["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": table}

    return change


def test_a_character_map_that_lengthens_texts_is_refused_before_it_runs(folder: Path) -> None:
    check(change_tokenizer(folder, mapping_to("صلى الله عليه وسلم".encode())))  # of one character, under NFKC
    with pytest.raises(CheckpointRefused, match="normalizer can make a text 1e\\+05 times as long"):
        check(change_tokenizer(folder, mapping_to(b"x" * 100_000)))


def test_a_text_that_grows_where_nothing_was_is_refused(folder: Path) -> None:
    change_tokenizer(folder, replacing({"Regex": "(?=.)"}, "a", times=10))
    with pytest.raises(CheckpointRefused, match=r"makes [0-9,]+ characters of [0-9]+ characters"):
        check(folder)


def nested(document: dict[str, Any]) -> None:
    for _ in range(60):
        document["normalizer"] = {"type": "Sequence", "normalizers": [document["normalizer"]]}


def with_dropout(document: dict[str, Any]) -> None:
    document["model"]["dropout"] = 0.5


def without_unknown(document: dict[str, Any]) -> None:
    del document["model"]["vocab"]["[UNK]"]
    document["added_tokens"] = [token for token in document["added_tokens"] if token["content"] != "[UNK]"]


def with_segments(document: dict[str, Any]) -> None:
    document["post_processor"]["pair"][3]["Sequence"]["type_id"] = 5


def with_long_template(document: dict[str, Any]) -> None:
    single = document["post_processor"]["single"]
    document["post_processor"]["single"] = [single[0]] * 70 + single[1:]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (adding(*(f"<t{number}>" for number in range(20_001)), first_id=90), "20,001 added tokens"),
        (adding("x" * 1001, first_id=90), "1,001 characters"),
        (replacing({"String": "a"}, "b" * 1001), "1,000 characters"),
        (nested, "61 steps"),
        (with_dropout, "equal texts would get different answers"),
        (without_unknown, "cannot read"),
        (with_segments, "post_processor"),
        (with_long_template, "special tokens"),
        (adding("<extra>", first_id=9999), "'<extra>' the id [0-9]+, but config.json's vocab_size is"),
    ],
)
def test_what_cannot_serve_is_refused_with_its_cause(folder: Path, change: Callable[[Any], None], says: str) -> None:
    change_tokenizer(folder, change)
    with pytest.raises(CheckpointRefused, match=says) as told:
        check(folder)
    assert "json" in str(told.value)


@pytest.mark.parametrize("padding", [-1, 10_000])
def test_a_padding_id_without_a_row_is_refused(folder: Path, padding: int) -> None:
    change_config(folder, pad_token_id=padding)
    with pytest.raises(CheckpointRefused, match=f"pad_token_id is {padding}"):
        check(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": "1.0"}', '{"a":' * 5000, '{"model": 3}', "null"])
def test_documents_of_another_shape_are_refused(folder: Path, content: str) -> None:
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises((CheckpointRefused, BackboneUnavailable)):
        check(folder)


def test_a_slow_tokenizer_is_not_taken_for_a_steep_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_audit, "_NOTICED_S", 0.0)
    check(folder)


def test_every_refusal_is_an_answer() -> None:
    assert issubclass(CheckpointRefused, ModelingError)
