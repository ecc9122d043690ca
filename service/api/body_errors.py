"""What is wrong with a JSON body, in a client's words: every place in it, by the schema of the struct it should be.

msgspec reads a good body fast, stops at the first fault of a bad one, and names it in its own types. So a body that it
refuses is read again here.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, Final, NamedTuple, TypeVar

import msgspec

from service.api.guard import OFF_LOOP_BYTES
from service.api.problems import MAX_LISTED_ERRORS, MAX_LOCATION_CHARS, Problem

Body = TypeVar("Body")
Place = tuple[str | int, ...]
Schema = Mapping[str, Any]


_HALF_PAIR: Final = re.compile("[\ud800-\udfff]")


class _Kind(NamedTuple):
    """A JSON type: its name for people, what Python reads it as, and the words that bound it in a schema."""

    name: str
    types: tuple[type, ...]
    least: str = ""
    most: str = ""
    of: str = "of length "


_KINDS: Final[Mapping[str, _Kind]] = {
    "string": _Kind("a string", (str,), "minLength", "maxLength"),
    "integer": _Kind("a whole number", (int,), "minimum", "maximum", "from "),
    "number": _Kind("a number", (float, int), "minimum", "maximum", "from "),
    "boolean": _Kind("true or false", (bool,)),
    "array": _Kind("a list", (list,), "minItems", "maxItems"),
    "object": _Kind("an object", (dict,)),
    "null": _Kind("null", (type(None),)),
}
_NAMES: Final = {kind.types[0]: kind.name for kind in _KINDS.values()} | {float: "a decimal number", bool: "a boolean"}


async def read_or_explain(content: bytes, wanted: type[Body]) -> Body:
    """Read a body that msgspec refused; large ones off the event loop.

    Raises 400 if it is no JSON, else 422 with the places that are wrong, never with their values. It is `wanted` after
    all if only the first of two members of one name was wrong: the last counts.
    """
    if len(content) > OFF_LOOP_BYTES:
        return await asyncio.to_thread(_read, content, wanted)
    return _read(content, wanted)


def _read(content: bytes, wanted: type[Body]) -> Body:
    value = _parsed(content)
    (schema,), definitions = msgspec.json.schema_components([wanted])
    found = list(islice(_faults(value, schema, definitions, ()), MAX_LISTED_ERRORS))
    if not found:
        return msgspec.convert(value, wanted)
    errors = [{"loc": ["body", *place], "message": f"{_path(place)} {words}"} for place, words in found]
    more = f"; errors lists {len(errors)} places" if len(errors) > 1 else ""
    raise Problem(422, "invalid_request", f"The request is not valid: {errors[0]['message']}{more}.", errors=errors)


async def read_storable(content: bytes) -> Any:
    """Read JSON that is to be stored; large bodies off the event loop.

    Raises 400 if it is none, 422 for values that no database can hold.
    """
    if len(content) > OFF_LOOP_BYTES:
        return await asyncio.to_thread(_storable, content)
    return _storable(content)


def _storable(content: bytes) -> Any:
    value = _parsed(content)
    refuse_unstorable_values(value)
    return value


def refuse_unstorable_values(value: Any, place: Place = ("body",)) -> None:
    """Raise 422 that names the place of a string with NUL or of an integer beyond 64 bits, 400 for half a pair."""
    _refuse_halves(value, place)
    for where, scalar in _scalars(value, place):
        if isinstance(scalar, str) and "\0" in scalar:
            message = f"{_path(where[1:])} holds a NUL character; leave it out"
        elif isinstance(scalar, int) and not -(2**63) <= scalar < 2**63:
            message = f"{_path(where[1:])} is beyond 64 bits; give a smaller number"
        else:
            continue
        raise Problem(422, "invalid_request", message, errors=[{"loc": _cut(where), "message": message}])


def _refuse_halves(value: Any, place: Place) -> None:
    with contextlib.suppress(UnicodeEncodeError):
        json.dumps(value, ensure_ascii=False).encode()  # nearly always, and at the speed of C
        return
    for where, scalar in _scalars(value, place):
        if isinstance(scalar, str) and _HALF_PAIR.search(scalar):
            message = f"{_path(where[1:])} escapes half of a surrogate pair, which is no character"
            raise Problem(
                400,
                "malformed_request",
                f"The body is not valid JSON: {message}.",
                errors=[{"loc": _cut(where), "message": message}],
            )


def _scalars(value: Any, place: Place) -> Iterator[tuple[Place, Any]]:
    """Every value that holds no others with its place; names of members too, at the place of their object."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield place, name
            yield from _scalars(item, (*place, name))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _scalars(item, (*place, index))
    else:
        yield place, value


def _cut(place: Place) -> list[str | int]:
    return [part[:MAX_LOCATION_CHARS] if isinstance(part, str) else part for part in place]


def _parsed(content: bytes) -> Any:
    try:
        value = json.loads(content.decode(), parse_constant=int)  # to which NaN is no number either
        _refuse_halves(value, ("body",))
        return value
    except json.JSONDecodeError as error:
        reason = f"{error.msg} (character {error.pos})"
    except UnicodeDecodeError:
        reason = "it is not UTF-8 text"
    except RecursionError:
        reason = "it is nested too deeply"
    except ValueError:
        reason = "a number is NaN, infinite or too long"
    raise Problem(400, "malformed_request", f"The body is not valid JSON: {reason}.")


def _faults(value: Any, schema: Schema, definitions: Mapping[str, Schema], place: Place) -> Iterator[tuple[Place, str]]:
    """What is wrong where, in the order of the schema."""
    named = [definitions[one["$ref"][8:]] if "$ref" in one else one for one in schema.get("anyOf", [schema])]
    fitting = next((one for one in named if type(value) in _kind(one).types), None)
    if fitting is None:
        yield place, f"must be {_expected(named)}, not {_NAMES[type(value)]}"
    elif not _is_within(value, fitting):
        yield place, f"must be {_expected(named)}"
    elif isinstance(value, list):
        own = fitting.get("prefixItems") or [fitting["items"]] * len(value)
        for index, item in enumerate(value):
            yield from _faults(item, own[index], definitions, (*place, index))
    elif isinstance(value, dict):
        known = fitting["properties"]
        yield from (((*place, name), "is missing") for name in fitting["required"] if name not in value)
        for name, item in value.items():
            if name in known:
                yield from _faults(item, known[name], definitions, (*place, name))
            elif not fitting.get("additionalProperties", True):
                yield (*place, name[:MAX_LOCATION_CHARS]), f"is unknown; the fields here are {', '.join(known)}"


def _kind(schema: Schema) -> _Kind:
    return _KINDS[schema.get("type", "string")]  # an enumeration has no type


def _is_within(value: Any, schema: Schema) -> bool:
    """Whether a value of the right type keeps the bounds."""
    if "enum" in schema:
        return value in schema["enum"]
    kind, size = _kind(schema), len(value) if isinstance(value, str | list) else value
    return bool(schema.get(kind.least, size) <= size <= schema.get(kind.most, size)) if kind.least else True


def _expected(schemas: list[Schema]) -> str:
    """What fits, in words; null, which is as good as leaving it out, is not said."""
    return " or ".join(_described(schema, _kind(schema)) for schema in schemas if schema.get("type") != "null")


def _described(schema: Schema, kind: _Kind) -> str:
    if "enum" in schema:
        return " or ".join(map(repr, schema["enum"]))
    least, most = schema.get(kind.least), schema.get(kind.most)
    upper = "" if most in (None, least) else f" to {most}"
    return kind.name if least is None else f"{kind.name} {kind.of}{least}{upper}"


def _path(place: Place) -> str:
    """As most languages write it: `inputs[3]`, `parameters.top_k`."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in place]
    return "".join(parts).lstrip(".") or "the body"
