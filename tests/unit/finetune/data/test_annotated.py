"""Annotated texts as people have them: what tools export becomes a text and its spans, or a finding says why not."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.canonical import read_batches
from finetune.data.check import ROWS_FILE, write_checked
from finetune.data.readers import detect_format
from finetune.data.record_batches import FindingLog
from finetune.data.records import DatasetReport, FileFormat
from finetune.data.spans import Span, check_spans, cuts_a_word, read_spans, to_cell
from finetune.data.tag_schemes import TagReader, join_tokens, place_tokens
from finetune.data.targets.spans import SpanTarget
from modeling.inputs import BadCell

TEXT = "Ada lives in New York"
PEOPLE, PLACES = (0, 3, "PER"), (13, 21, "LOC")
TOKENS = ["Ada", "lives", "in", "New", "York"]


def checked(tmp_path: Path, content: str, name: str = "rows.jsonl") -> tuple[DatasetReport, list[dict[str, Any]]]:
    """The report, and the rows as they are kept."""
    raw = tmp_path / name
    raw.write_text(content, encoding="utf-8")
    format_ = detect_format(name, content.encode()[:4096])
    assert format_ is not None
    report = write_checked(raw, format_, tmp_path)
    names = [column.name for column in report.columns]
    if not names:
        return report, []
    found = [
        dict(zip(names, cells, strict=True))
        for batch in read_batches(tmp_path / ROWS_FILE, names)
        for cells in zip(*batch.columns, strict=True)
    ]
    return report, found


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def triples(cell: str) -> list[tuple[int, int, str]]:
    return [(span.start, span.end, span.label) for span in read_spans(cell)]


TOOLS: dict[str, Any] = {
    "doccano": {"id": 1, "text": TEXT, "label": [list(PEOPLE), list(PLACES)], "Comments": []},
    "doccano with relations": {
        "id": 1,
        "text": TEXT,
        "entities": [
            {"id": 7, "label": "PER", "start_offset": 0, "end_offset": 3},
            {"id": 8, "label": "LOC", "start_offset": 13, "end_offset": 21},
        ],
        "relations": [{"id": 1, "from_id": 7, "to_id": 8, "type": "lives"}],
    },
    "prodigy": {
        "text": TEXT,
        "_input_hash": -3,
        "tokens": [{"text": "Ada", "start": 0, "end": 3, "id": 0}],
        "spans": [
            {"start": 0, "end": 3, "token_start": 0, "token_end": 0, "label": "PER"},
            {"start": 13, "end": 21, "token_start": 3, "token_end": 4, "label": "LOC"},
        ],
        "answer": "accept",
        "meta": {"source": "x"},
    },
    "label studio": {
        "id": 3,
        "data": {"text": TEXT},
        "annotations": [
            {"was_cancelled": True, "result": []},
            {
                "was_cancelled": False,
                "result": [
                    {"type": "labels", "value": {"start": 0, "end": 3, "text": "Ada", "labels": ["PER"]}},
                    {"type": "labels", "value": {"start": 13, "end": 21, "text": "New York", "labels": ["LOC"]}},
                    {"type": "choices", "value": {"choices": ["good"]}},
                ],
            },
        ],
    },
    "label studio, json-min": {
        "text": TEXT,
        "label": [
            {"start": 0, "end": 3, "text": "Ada", "labels": ["PER"]},
            {"start": 13, "end": 21, "text": "New York", "labels": ["LOC"]},
        ],
        "annotator": 1,
    },
    "hugging face": {"tokens": TOKENS, "ner_tags": ["B-PER", "O", "O", "B-LOC", "I-LOC"]},
    "tokens of a text": {"text": TEXT, "tokens": TOKENS, "tags": ["U-PER", "O", "O", "B-LOC", "L-LOC"]},
    "spans": {"text": TEXT, "spans": [list(PEOPLE), {"start": 13, "end": 21, "label": "LOC"}]},
}


@pytest.mark.parametrize("tool", TOOLS)
def test_what_a_tool_exports_is_a_text_with_spans(tmp_path: Path, tool: str) -> None:
    for content, name in ((lines(TOOLS[tool]), "rows.jsonl"), (json.dumps([TOOLS[tool]], indent=2), "rows.json")):
        report, rows = checked(tmp_path, content, name)
        assert report.is_valid, report.findings
        ((row),) = rows
        assert row["text"] == TEXT
        assert triples(row["spans"]) == [PEOPLE, PLACES]


def test_a_tokens_text_keeps_its_blanks(tmp_path: Path) -> None:
    row = {"text": "Ada   lives\tin New York", "tokens": TOKENS, "tags": ["B-PER", "O", "O", "B-LOC", "I-LOC"]}
    _, (found,) = checked(tmp_path, lines(row))
    assert found["text"] == row["text"]
    assert [found["text"][start:end] for start, end, _ in triples(found["spans"])] == ["Ada", "New York"]


def test_conll_in_either_column_order(tmp_path: Path) -> None:
    plain = "-DOCSTART- -X- O O\n\nAda NNP B-NP I-PER\nlives VBZ O O\nin IN O O\n"
    plain += "New NNP B-NP I-LOC\nYork NNP I-NP I-LOC\n\n"
    counted = "# sent_id = 1\n" + "".join(
        f"{number}\t{token}\t_\t{tag}\n"
        for number, (token, tag) in enumerate(zip(TOKENS, ["B-PER", "O", "O", "B-LOC", "I-LOC"], strict=True), 1)
    )
    for content, name, scheme in ((plain, "train.txt", "IOB1"), (counted, "train.conllu", "BIO")):
        report, (row,) = checked(tmp_path, content, name)
        assert (row["text"], triples(row["spans"])) == (TEXT, [PEOPLE, PLACES])
        assert any(scheme in finding.message for finding in report.findings if finding.code == "tag_scheme")
        assert not [finding for finding in report.findings if finding.code == "illegal_transition"]


def test_rows_that_were_not_accepted_are_left_out_and_told(tmp_path: Path) -> None:
    rejected = {**TOOLS["prodigy"], "answer": "reject"}
    open_task = {"id": 4, "data": {"text": "a"}, "annotations": []}
    report, rows = checked(tmp_path, lines(TOOLS["prodigy"], rejected, open_task))
    assert len(rows) == 1 and report.is_valid
    (finding,) = [one for one in report.findings if one.code == "row_left_out" and 2 in one.rows]
    assert finding.severity == "info"


@pytest.mark.parametrize(
    ("row", "code", "words"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "tokens_tags_length", "2 tokens and 1 tags"),
        ({"tokens": ["a", "b"], "ner_tags": [0, 3]}, "unknown_scheme", "the tag '0'"),
        ({"text": "abc", "spans": [{"start": 0, "end": 2}]}, "parse_error", "needs one name"),
        ({"text": "abc", "spans": [[0, "x", "PER"]]}, "parse_error", "no place in a text"),
    ],
)
def test_what_cannot_be_read_says_why(tmp_path: Path, row: Any, code: str, words: str) -> None:
    report, _ = checked(tmp_path, lines({"text": "Ada", "spans": [[0, 3, "PER"]]}, row))
    (finding,) = [one for one in report.findings if one.code == code]
    assert words in finding.message and finding.fix and finding.rows == [2]


@pytest.mark.parametrize(
    "row",
    [
        {"text": "the cat sat", "tokens": ["the", "cat", "sat"], "labels": ["animals"]},
        {"text": "the cat", "tokens": ["the", "cat"], "tags": ["DET", "NOUN"], "label": "x"},
        {"text": "a", "label": ["x", "y"]},
        {"text": "a", "label": []},
    ],
)
def test_lists_that_mean_no_entities_stay_as_they_are(tmp_path: Path, row: dict[str, Any]) -> None:
    report, (found,) = checked(tmp_path, lines(row))
    assert report.is_valid and not report.findings
    assert found == {key: value if isinstance(value, str) else json.dumps(value) for key, value in row.items()}


def test_texts_without_an_entity_are_told_by_the_others(tmp_path: Path) -> None:
    doccano = [{"id": 2, "text": "Nothing", "label": [], "Comments": []}, TOOLS["doccano"]]
    others = [{"text": "Nothing", "entities": [], "relations": []}, TOOLS["doccano with relations"]]
    prodigy = [{"text": "Nothing", "tokens": [{"text": "Nothing", "id": 0}], "answer": "accept"}, TOOLS["prodigy"]]
    for rows in (doccano, others, prodigy):
        report, (empty, full) = checked(tmp_path, lines(*rows))
        assert report.is_valid, report.findings
        assert (triples(empty["spans"]), triples(full["spans"])) == ([], [PEOPLE, PLACES])
        assert not {"label", "entities"} & empty.keys()


def test_a_label_studio_task_is_read_by_the_text_of_its_spans(tmp_path: Path) -> None:
    region = {"value": {"start": 0, "end": 3, "text": "Ada", "labels": ["PER"]}}
    task = {"data": {"doc_id": 17, "body": "Ada lives"}, "annotations": [{"result": [region]}]}
    _, (found,) = checked(tmp_path, lines(task))
    assert (found["text"], found["doc_id"]) == ("Ada lives", "17")
    html = {"value": {"start": "/p[1]/text()[1]", "hypertextlabels": ["PER"]}}
    report, _ = checked(tmp_path, lines(task, {**task, "annotations": [{"result": [html]}]}))
    assert any("hypertextlabels" in finding.message for finding in report.findings)
    choice = {"data": {"text": "good"}, "annotations": [{"result": [{"value": {"choices": ["positive"]}}]}]}
    _, (chosen,) = checked(tmp_path, lines(choice))
    assert chosen == {"text": "good", "label": "positive"}


def test_conll_with_numbers_and_signs_as_tokens(tmp_path: Path) -> None:
    content = "# newdoc\n1 CD O\nAda NNP B-PER\n\n# SYM O\n² CD O\n\n"
    report, rows = checked(tmp_path, content, "a.conll")
    assert report.is_valid, report.findings
    assert [row["text"] for row in rows] == ["1 Ada", "# ²"]


def test_an_array_is_read_to_its_end_or_told(tmp_path: Path) -> None:
    row = {"text": "a", "label": "b"}
    many = [{"text": "word " * 12, "label": "x", "i": number} for number in range(20_000)]
    report, _ = checked(tmp_path, json.dumps(many), "a.json")
    assert report.rows == 20_000 and report.is_valid
    for content, words in (
        (f"[{json.dumps(row)}]\n[{json.dumps(row)}]", "more behind the end"),
        (f"[{json.dumps(row)},,{json.dumps(row)}]", "is not JSON"),
        (f"[{json.dumps(row)} {json.dumps(row)}]", "in the place of ']'"),
        ('[{"text": "a", "label": NaN}, ' + json.dumps(row) + "]", "holds NaN"),
        ('[{"text": ' + "[" * 3000 + "]" * 3000 + "}]", "nested"),
    ):
        report, _ = checked(tmp_path, content, "a.json")
        assert any(words in finding.message for finding in report.findings), (content[:60], report.findings)
    assert report.rows == 0
    empty, _ = checked(tmp_path, '[{"text": "a"}, {"text": "b"}]', "a.json")
    assert empty.rows == 2


def test_an_illegal_transition_is_told_and_read_as_an_entity_of_its_own(tmp_path: Path) -> None:
    rows = [
        {"tokens": ["Ada", "New", "York"], "tags": ["B-PER", "B-LOC", "I-LOC"]},
        {"tokens": ["in", "Rome"], "tags": ["O", "I-LOC"]},
    ]
    report, found = checked(tmp_path, lines(*rows))
    (finding,) = [one for one in report.findings if one.code == "illegal_transition"]
    assert finding.rows == [2] and finding.severity == "warning"
    assert triples(found[1]["spans"]) == [(3, 7, "LOC")]


@pytest.mark.parametrize(
    ("text", "spans", "code"),
    [
        ("abc", [Span(1, 9, "X")], "span_outside_text"),
        ("abc", [Span(1, 1, "X")], "span_outside_text"),
        ("abc def", [Span(0, 5, "X"), Span(4, 7, "Y")], "overlapping_spans"),
        ("abc def", [Span(0, 3, "X", "def")], "span_text_mismatch"),
    ],
)
def test_spans_that_do_not_fit_their_text(text: str, spans: list[Span], code: str) -> None:
    with pytest.raises(BadCell) as caught:
        check_spans(text, spans)
    assert caught.value.code == code


def test_offsets_in_utf16_are_recognised_by_the_texts_that_they_name() -> None:
    text = "😀😀 Ada"
    with pytest.raises(BadCell) as caught:
        check_spans(text, [Span(5, 8, "PER", "Ada")])
    assert "UTF-16" in caught.value.fix
    check_spans(text, [Span(3, 6, "PER", "Ada")])


def test_blanks_at_the_edge_of_a_span_and_spans_given_twice_do_no_harm() -> None:
    target = SpanTarget("token-classification")
    read = target.read('[[0, 4, "PER"], [0, 3, "PER"], [13, 21, "LOC"], [13, 21, "LOC"]]')
    with pytest.raises(BadCell, match="overlapping"):
        target.fit(read, TEXT)
    read = target.read('[[0, 4, "PER"], [13, 21, "LOC"], [13, 21, "LOC"]]')
    assert json.loads(target.fit(read, TEXT)) == [list(PEOPLE), list(PLACES)]


def test_a_span_within_a_word_is_noticed() -> None:
    assert cuts_a_word("Adam lives", [Span(0, 3, "PER")])
    assert not cuts_a_word("Ada lives.", [Span(0, 3, "PER"), Span(4, 9, "X")])
    assert not cuts_a_word("Ada lives", [Span(0, 4, "PER")])  # a blank at its edge


SCHEMES = ("BIO", "IOB1", "BIOES", "BILOU")


def written(words: int, runs: list[tuple[int, int, str]], scheme: str) -> list[str]:
    """The tags of entities in a scheme, the other way round."""
    tags = ["O"] * words
    for number, (first, stop, type_) in enumerate(runs):
        for at in range(first, stop):
            tags[at] = f"I-{type_}"
        before = runs[number - 1] if number else None
        if scheme != "IOB1" or (before is not None and before[1] == first and before[2] == type_):
            tags[first] = f"B-{type_}"
        if scheme in {"BIOES", "BILOU"}:
            last, single = ("E", "S") if scheme == "BIOES" else ("L", "U")
            tags[stop - 1] = f"{single if stop - first == 1 else last}-{type_}"
    return tags


@given(st.integers(0, 10**6), st.sampled_from(SCHEMES))
def test_every_scheme_gives_back_the_entities_that_were_written(seed: int, scheme: str) -> None:
    draw = random.Random(seed)
    words, runs, at = draw.randint(1, 12), [], 0
    while at < words:
        stop = min(words, at + draw.randint(1, 3))
        if draw.random() < 0.6:
            runs.append((at, stop, draw.choice("XY")))
        at = stop
    tokens = [f"w{number}" for number in range(words)]
    text, places = join_tokens(tokens)
    assert place_tokens(text, tokens) == places
    reader = TagReader()
    spans = reader.spans(1, written(words, runs, scheme), places)
    assert [(span.start, span.end, span.label) for span in spans] == [
        (places[first][0], places[stop - 1][1], type_) for first, stop, type_ in runs
    ]
    log = FindingLog()
    reader.tell(log, "tags")
    assert "illegal_transition" not in {finding.code for finding in log.findings()}


def test_a_cell_is_read_as_it_was_written() -> None:
    spans = [Span(0, 3, "PER", "Ada"), Span(13, 21, "LOC")]
    assert read_spans(to_cell(spans)) == spans


def test_a_large_array_is_read_one_item_at_a_time(tmp_path: Path) -> None:
    long = "x" * 3_000_000
    rows = [{"text": f"{long if number == 1 else 'a'} {number}", "label": "b"} for number in range(5)]
    report, _ = checked(tmp_path, json.dumps(rows), "rows.json")
    assert report.rows == 4 and any("larger" in finding.message for finding in report.findings)
    broken, _ = checked(tmp_path, json.dumps(rows[2:])[:-20], "rows.json")
    assert broken.rows == 2 and any("item 3 is not JSON" in finding.message for finding in broken.findings)


def test_formats_are_known_by_content_or_name() -> None:
    wanted: list[tuple[str, bytes, FileFormat | None]] = [
        ("a.json", b'[\n {"text": 1}]', "json"),
        ("a.json", b'{"text": 1}\n', "jsonl"),
        ("a.txt", b"Ada B-PER\nsleeps O\n\nOslo B-LOC\n", "conll"),
        ("a.bio", b"x", "conll"),
        ("a.txt", b"one, two\nthree, four\n", "csv"),
        ("a.txt", b"just a text\nof two lines\n", None),
        ("a.json", b"[1, 2]", None),
    ]
    for name, head, format_ in wanted:
        assert detect_format(name, head) == format_, name
