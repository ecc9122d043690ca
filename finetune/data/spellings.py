"""How values are spelled in cells of text: lists, names of labels, numbers. Pure; knows no file and no target.

One value has one name in every format: what parquet and jsonl have as `true` and 1, a csv file may have as `True` and
`1.0`, as data frames write them.
"""

from __future__ import annotations

import ast
import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

from modeling.inputs.text_identity import normalise

NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)
ListSpelling = Literal["json", "python"]
NumberSpelling = Literal["point", "comma", "unclear"]

_CLOSING = {"[": "]", "(": ")", "{": "}"}
_TOKEN = re.compile(
    r"""(?P<quoted>u?(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"))|(?P<gap>[\s,]+)|(?P<bare>[^\s,'"\[\](){}]+)""", re.DOTALL
)
_ARRAY = re.compile(r"array\(\s*(\[.*\])\s*(?:,\s*dtype=[^()]{1,40})?\)", re.DOTALL)
_BOOLEANS = frozenset({"true", "false"})
_NOTHING = frozenset({"None", "NaN", "nan", "null"})
_WHOLE = re.compile(r"([+-]?(?:0|[1-9]\d*))\.0+", re.ASCII)
_PADDED = re.compile(r"([+-]?(?:0|[1-9]\d*)\.\d*[1-9])0+", re.ASCII)
_LONGEST_NUMBER = 40


class SpelledList(NamedTuple):
    items: list[str]
    spelling: ListSpelling


def read_list(cell: str) -> SpelledList | None:
    """The items of a list, as JSON writes it or as Python, pandas and numpy print it; None for anything else.

    Items are strings, numbers and booleans; those of a tuple or a set are strings, for `(1)` is more often no list.
    """
    text = cell.strip()
    if not text.startswith(("[", "(", "{", "array(")):
        return None
    found = _json_list(text) if text[0] == "[" else None
    if found is not None:
        return SpelledList(found, "json")
    array = _ARRAY.fullmatch(text)
    printed = _printed_list(array[1] if array else text)
    return None if printed is None else SpelledList(printed, "python")


def _json_list(text: str) -> list[str] | None:
    try:
        value: Any = json.loads(text, parse_int=str, parse_float=str)
    except (ValueError, RecursionError):
        return None
    items = list_items(value) if isinstance(value, list) else None
    return items if items or not value else None  # `[null]` may be the name of a class


def list_items(values: Iterable[Any]) -> list[str] | None:
    """Strings and booleans as items, without what is null; None if there is anything else."""
    given = [value for value in values if value is not None]
    if not all(isinstance(item, str | bool) for item in given):
        return None
    return [item if isinstance(item, str) else str(item).lower() for item in given]


def _printed_list(text: str) -> list[str] | None:
    """Token by token, so that the time is linear whatever the cell holds. numpy writes no commas."""
    if text[-1] != _CLOSING.get(text[0]):
        return None
    items: list[str] = []
    at, end, is_open, has_nothing = 1, len(text) - 1, True, False
    while at < end:
        token = _TOKEN.match(text, at, end)
        if token is None:
            return None
        at = token.end()
        if token["gap"]:
            is_open = True
            continue
        if not is_open:
            return None
        is_open = False
        if token["bare"] in _NOTHING and text[0] == "[":
            has_nothing = True
            continue
        item = _item(token, only_quoted=text[0] != "[")
        if item is None:
            return None
        items.append(item)
    return items if items or (text[0] == "[" and not has_nothing) else None


def _item(token: re.Match[str], *, only_quoted: bool) -> str | None:
    if token["quoted"]:
        try:
            return str(ast.literal_eval(token["quoted"]))
        except (ValueError, SyntaxError):
            return None
    bare = token["bare"]
    if only_quoted or not (NUMBER.fullmatch(bare) or bare.lower() in _BOOLEANS):
        return None
    return bare.removesuffix(".")


def label_name(label: str) -> str:
    """The one name of a label: `True` and `TRUE` are `true`, `1.0` is `1`, `1.50` is `1.5`; others stay as they are."""
    if len(label) > _LONGEST_NUMBER:
        return label
    if label.lower() in _BOOLEANS:
        return label.lower()
    found = _WHOLE.fullmatch(label) or _PADDED.fullmatch(label)
    return found[1] if found else label


def one_label(label: str) -> str:
    """What labels have in common that were meant to be one: all but case, blanks, and what cannot be seen."""
    return normalise("".join(one for one in label if unicodedata.category(one) != "Cf"))


def side_by_side(labels: Sequence[str]) -> str:
    """Labels for a message, with escapes if they look alike."""
    looks = {unicodedata.normalize("NFKC", "".join(filter(str.isprintable, label))) for label in labels}
    return " / ".join(map(repr if len(looks) == len(labels) else ascii, labels))


# Numbers

_GROUPS = re.compile(r"(?<=\d)[ \u00a0\u202f'’](?=\d{3}(?!\d))")
_DECIMAL_COMMA = re.compile(
    r"[+-]?(?:0,\d+|\d+,(?!\d{3}$)\d*|\d{4,},\d+|\d{1,3}(?:\.\d{3})+,\d*)(?:[eE][+-]?\d+)?", re.ASCII
)
_GROUPING_COMMA = re.compile(r"[+-]?\d{1,3}(?:(?:,\d{3})+\.\d*|(?:,\d{3}){2,})", re.ASCII)
_DECIMAL_POINT = re.compile(r"[+-]?(?:0\.\d+|\d*\.(?!\d{3}$)\d*|\d{4,}\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)
_FORMS = {
    "point": re.compile(r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d*)?(?:[eE][+-]?\d+)?", re.ASCII),
    "comma": re.compile(r"[+-]?(?:\d{1,3}(?:\.\d{3})+|\d+)?(?:,\d*)?(?:[eE][+-]?\d+)?", re.ASCII),
}


def number_spelling(cells: Iterable[str | None]) -> tuple[NumberSpelling | None, str]:
    """Which mark divides whole from fraction in a column that also has other marks, with the first cell that does; None
    where every number is plain. `unclear`: both marks do, or `1,200` alone could be either."""
    kinds: set[str] = set()
    first = ""
    for cell in cells:
        text = (cell or "").strip()
        if len(text) > _LONGEST_NUMBER:
            continue
        if NUMBER.fullmatch(text):
            kinds.update({"point"} if _DECIMAL_POINT.fullmatch(text) else ())
            continue
        bare = _GROUPS.sub("", text)
        kind = _kind(bare)
        if kind is not None:
            kinds.add(kind)
            first = first or text
    if not first:
        return None, ""
    if "comma" in kinds:
        return ("unclear" if kinds & {"point", "grouping"} else "comma"), first
    return ("point" if kinds & {"point", "grouping", "plain"} and kinds != {"plain", "either"} else "unclear"), first


def _kind(text: str) -> str | None:
    """What a number with other marks than a point shows of its column."""
    if NUMBER.fullmatch(text):
        return "point" if _DECIMAL_POINT.fullmatch(text) else "plain"
    if _DECIMAL_COMMA.fullmatch(text):
        return "comma"
    if _GROUPING_COMMA.fullmatch(text):
        return "grouping"
    return "either" if re.fullmatch(r"[+-]?[1-9]\d{0,2},\d{3}", text, re.ASCII) else None


def plain_number(text: str, spelling: NumberSpelling | None) -> str:
    """The number as Python reads it, as far as it is spelled like its column; else the text as it is."""
    if spelling not in _FORMS or len(text) > _LONGEST_NUMBER:
        return text
    bare = _GROUPS.sub("", text)
    if not _FORMS[spelling].fullmatch(bare):
        return text
    return bare.replace(",", "") if spelling == "point" else bare.replace(".", "").replace(",", ".")
