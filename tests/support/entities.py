"""Sentences with people and places in them, made of templates: what models of entities are trained on in tests."""

from __future__ import annotations

import random
import re
from typing import Any

PEOPLE = (
    *(
        "Ada",
        "Grace Hopper",
        "Alan Turing",
        "Emmy Noether",
        "Maria",
        "Niels Bohr",
        "Lise",
        "Kurt",
        "Rosa Parks",
        "Omar",
    ),
    *("Chen Wei", "Anna O'Neil", "José", "Ingrid Bergman", "Paul", "Tove", "Nina Simone", "Luca", "Ivo", "Zoë Müller"),
)
PLACES = (
    *("Paris", "New York", "Oslo", "São Paulo", "Rome", "Lagos", "Kyoto", "Lima", "Tel Aviv", "Graz", "Bonn"),
    *("Porto", "Riga", "Cairo", "Los Angeles", "Delhi", "Quito", "Bern"),
)
TEMPLATES = (
    "{PER} lives in {LOC} .",
    "yesterday {PER} flew from {LOC} to {LOC}, and slept .",
    "the train to {LOC} was late again",
    "we met {PER} and {PER} at noon",
    "nothing happened on that day",
    "{PER} said: 'I miss {LOC}!'",
    "a letter for {PER} came from {LOC}",
    "it rained, and the film was dull",
)
_FILLERS = {"PER": PEOPLE, "LOC": PLACES}


def sentence(draw: random.Random, templates: tuple[str, ...] = TEMPLATES) -> tuple[str, list[tuple[int, int, str]]]:
    """Return a text and its entities as start, end and type."""
    parts = re.split(r"\{(PER|LOC)\}", draw.choice(templates))
    text, spans = parts[0], []
    for type_, behind in zip(parts[1::2], parts[2::2], strict=True):
        name = draw.choice(_FILLERS[type_])
        spans.append((len(text), len(text) + len(name), type_))
        text += name + behind
    return text, spans


def rows(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Return rows of text and spans, each different from all others."""
    draw = random.Random(seed)
    found = []
    for number in range(count):
        text, spans = sentence(draw)
        found.append(
            {
                "text": f"{text} {chr(97 + number % 26)}{number}",
                "spans": [{"start": start, "end": end, "label": type_} for start, end, type_ in spans],
            }
        )
    return found
