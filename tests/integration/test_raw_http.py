"""Raw bytes against the whole application behind its real protocol, with keys.

Each shape says which statuses come back. A connection that stays open is asked for one thing more: a body that was
framed wrongly would swallow that request, or add an answer before it. None may end in a 5xx.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from service.settings import ApiKey, ServingSettings
from tests.support.asgi import RecordingApp
from tests.support.edge import Edge, chunked, problem_in, serving

BODY = b'{"model": "p", "inputs": ["x"]}'
KEY = b"Authorization: Bearer secret\r\n"
HEAD = b"POST /predict HTTP/1.1\r\nHost: x\r\n" + KEY + b"Content-Type: application/json\r\n"
SIZE = b"%d" % len(BODY)
GOOD = HEAD + b"Content-Length: " + SIZE + b"\r\n\r\n" + BODY
IN_CHUNKS = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
HEX_SIZE = b"%x" % len(BODY)
LAST = b"0\r\n\r\n"
CANARY = b"GET /livez HTTP/1.1\r\nHost: x\r\nX-Request-ID: canary\r\nConnection: close\r\n\r\n"


@dataclass(frozen=True)
class Shape:
    sent: bytes
    statuses: tuple[int, ...]
    stays_open: bool = False
    ends_input: bool = False
    """The client says that it sends no more, since the server waits for the rest."""


def taken(sent: bytes, *statuses: int) -> Shape:
    """Answered, and the connection goes on."""
    return Shape(sent, statuses or (200,), stays_open=True)


def refused(sent: bytes, status: int = 400) -> Shape:
    """Answered once, and the connection ends."""
    return Shape(sent, (status,))


def unfinished(sent: bytes) -> Shape:
    """Never complete, so never answered."""
    return Shape(sent, (), ends_input=True)


def length(value: bytes) -> bytes:
    return HEAD + b"Content-Length: " + value + b"\r\n\r\n" + BODY


def sized(body: bytes) -> bytes:
    return HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body


def encoding(value: bytes) -> bytes:
    return HEAD + b"Transfer-Encoding: " + value + b"\r\n\r\n" + chunked(BODY) + LAST


def with_header(line: bytes) -> bytes:
    return HEAD + line + b"\r\nContent-Length: " + SIZE + b"\r\n\r\n" + BODY


def get(target: bytes, *lines: bytes, version: bytes = b"HTTP/1.1", host: bytes = b"Host: x\r\n") -> bytes:
    return b"GET " + target + b" " + version + b"\r\n" + host + b"".join(line + b"\r\n" for line in lines) + b"\r\n"


SHAPES = {
    "good": taken(GOOD),
    "pipelined": taken(GOOD * 3, 200, 200, 200),
    # How long is the body
    "length, then chunked": refused(HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n" + LAST + GOOD),
    "chunked, then length": refused(HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n" + LAST + GOOD),
    "two lengths that differ": refused(HEAD + b"Content-Length: 5\r\nContent-Length: " + SIZE + b"\r\n\r\n" + BODY),
    "two lengths that agree": refused(
        HEAD + b"Content-Length: " + SIZE + b"\r\nContent-Length: " + SIZE + b"\r\n\r\n" + BODY
    ),
    "a list of lengths": refused(length(SIZE + b", " + SIZE)),
    "a length with a sign": refused(length(b"+" + SIZE)),
    "a negative length": refused(length(b"-1")),
    "a length in hex": refused(length(b"0x" + HEX_SIZE)),
    "a length with a blank after it": taken(length(SIZE + b" ")),
    "a length with blanks around it": taken(length(b" \t" + SIZE + b"\t ")),
    "a length with a blank in it": refused(length(b"3 1")),
    "a length with an exponent": refused(length(b"1e1")),
    "a length of twenty digits": refused(length(b"9" * 20)),
    "a length above every limit": refused(length(b"9" * 18), 413),
    "an empty length": refused(length(b"")),
    "a superscript two": refused(length(b"\xb2")),
    "a length with a parameter": refused(length(SIZE + b";q=1")),
    "a length with a zero before it": taken(length(b"0" + SIZE)),
    "a blank before the colon of the length": refused(HEAD + b"Content-Length : " + SIZE + b"\r\n\r\n" + BODY),
    # Transfer encodings
    "chunked twice in one header": refused(encoding(b"chunked, chunked")),
    "chunked in two headers": refused(encoding(b"chunked\r\nTransfer-Encoding: chunked")),
    "gzip and chunked": refused(encoding(b"gzip, chunked")),
    "identity": refused(encoding(b"identity")),
    "identity and chunked": refused(encoding(b"identity, chunked")),
    "an unknown encoding": refused(encoding(b"xchunked")),
    "a vertical tab before chunked": refused(encoding(b"\x0bchunked")),
    "a NUL after chunked": refused(encoding(b"chunked\x00")),
    "a comma after chunked": refused(encoding(b"chunked,")),
    "chunked in quotes": refused(encoding(b'"chunked"')),
    "chunked on a folded line": refused(encoding(b"\r\n chunked")),
    "a blank before the colon of the encoding": refused(
        HEAD + b"Transfer-Encoding : chunked\r\n\r\n" + chunked(BODY) + LAST
    ),
    "chunked in capitals": taken(encoding(b"CHUNKED")),
    "blanks before chunked": taken(encoding(b" \tchunked")),
    "a blank after chunked": taken(encoding(b"chunked ")),
    # Header lines
    "a header without a colon": refused(HEAD + b"foo\r\n\r\n"),
    "line feeds alone": refused(GOOD.replace(b"\r\n", b"\n")),
    "a carriage return in a header": refused(with_header(b"X: a\rb: c")),
    "a NUL in a header": refused(with_header(b"X: a\x00b")),
    "a folded first header": refused(b"POST /predict HTTP/1.1\r\n Host: x\r\n\r\n"),
    "64 headers": taken(get(b"/livez", *[b"X: y"] * 63)),
    "65 headers": refused(get(b"/livez", *[b"X: y"] * 64), 431),
    "a header of 17 KB": refused(get(b"/livez", b"X: " + b"y" * 17_000), 431),
    "a header of 1 MB": refused(get(b"/livez", b"X: " + b"y" * 1_000_000), 431),
    # Chunks
    "chunks": taken(IN_CHUNKS + chunked(BODY[:5], BODY[5:]) + LAST),
    "a chunk with an extension": taken(IN_CHUNKS + HEX_SIZE + b";a=b\r\n" + BODY + b"\r\n" + LAST),
    "a chunk with a huge extension": refused(IN_CHUNKS + HEX_SIZE + b";" + b"a" * 200_000 + b"\r\n", 431),
    "a chunk size with 0x": refused(IN_CHUNKS + b"0x" + HEX_SIZE + b"\r\n" + BODY + b"\r\n" + LAST),
    "a chunk size with a minus": refused(IN_CHUNKS + b"-" + HEX_SIZE + b"\r\n" + BODY + b"\r\n" + LAST),
    "a chunk size with a plus": refused(IN_CHUNKS + b"+" + HEX_SIZE + b"\r\n" + BODY + b"\r\n" + LAST),
    "a chunk size with a blank": refused(IN_CHUNKS + HEX_SIZE + b" \r\n" + BODY + b"\r\n" + LAST),
    "a chunk size that overflows": refused(IN_CHUNKS + b"f" * 18 + b"\r\n" + BODY),
    "a chunk of 2^63 bytes": unfinished(IN_CHUNKS + b"7" + b"f" * 15 + b"\r\n" + BODY),
    "line feeds alone after a chunk": refused(IN_CHUNKS + HEX_SIZE + b"\n" + BODY + b"\n0\n\n"),
    "a chunk with no end of line": refused(IN_CHUNKS + HEX_SIZE + b"\r\n" + BODY + LAST),
    "a chunk with something else at its end": refused(IN_CHUNKS + HEX_SIZE + b"\r\n" + BODY + b"XX" + LAST),
    "a length among the trailers": refused(
        IN_CHUNKS + chunked(BODY) + b"0\r\nContent-Length: 50\r\nAuthorization: x\r\n\r\n" + GOOD
    ),
    "5,000 trailers, ignored": taken(IN_CHUNKS + chunked(BODY) + b"0\r\n" + b"X: y\r\n" * 5000 + b"\r\n"),
    "a chunk size of other letters": refused(IN_CHUNKS + b"zz\r\n"),
    "100,000 chunks of a byte": taken(IN_CHUNKS + chunked(*[b" "] * 100_000) + LAST, 400),
    "20,000 chunks with extensions": unfinished(IN_CHUNKS + (b"1;" + b"x" * 60 + b"\r\n \r\n") * 20_000),
    # A request where a body is
    "a request in the body of a GET": taken(get(b"/nowhere", KEY[:-2], b"Content-Length: %d" % len(GOOD)) + GOOD, 404),
    "a request in the body of a probe": taken(get(b"/livez", b"Content-Length: %d" % len(GOOD)) + GOOD),
    "an upgrade to h2c": Shape(
        get(b"/livez", b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAAA"), (200,)
    ),
    "an upgrade to a web socket": Shape(
        get(
            b"/livez",
            b"Connection: Upgrade",
            b"Upgrade: websocket",
            b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
            b"Sec-WebSocket-Version: 13",
        ),
        (200,),
    ),
    "an upgrade with a body": refused(with_header(b"Connection: Upgrade\r\nUpgrade: foo")),
    # The line of the request
    "one word": refused(b"HELLO\r\n\r\n"),
    "the first bytes of TLS": refused(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),
    "empty lines without end": refused(b"\r\n" * 100_000, 431),
    "the preface of HTTP/2": refused(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    "HTTP/1.0": Shape(get(b"/livez", version=b"HTTP/1.0", host=b""), (200,)),
    "HTTP/9.9": refused(get(b"/livez", version=b"HTTP/9.9")),
    "the whole address": taken(get(b"http://evil/livez")),
    "CONNECT": refused(b"CONNECT a:1 HTTP/1.1\r\nHost: x\r\n\r\n"),
    "OPTIONS *": taken(b"OPTIONS * HTTP/1.1\r\nHost: x\r\n" + KEY + b"\r\n", 404),
    "a NUL in the target": refused(get(b"/a\x00b")),
    "UTF-8 in the target": refused(get(b"/\xc3\xa9")),
    "0xff in the target": refused(get(b"/\xff")),
    "a target without a slash": refused(get(b"models")),
    "a target with two slashes": taken(get(b"//evil/%2f..", KEY[:-2]), 404),
    "a malformed escape in the target": taken(get(b"/nowhere/%zz", KEY[:-2]), 404),
    "a malformed escape in the query": taken(get(b"/livez?limit=%ff&limit=1")),
    "a target of 8,000 bytes": taken(get(b"/" + b"a" * 8000, KEY[:-2]), 404),
    "a target of 9,000 bytes": refused(get(b"/" + b"a" * 9000), 414),
    # The host
    "no host": refused(get(b"/livez", host=b"")),
    "two hosts": refused(get(b"/livez", b"Host: y")),
    "the same host twice": refused(get(b"/livez", b"Host: x")),
    "an empty host": taken(get(b"/livez", host=b"Host:\r\n")),
    "two hosts of HTTP/1.0": refused(get(b"/livez", b"Host: y", version=b"HTTP/1.0")),
    # Who asks
    "a basic password before a key": taken(get(b"/nowhere", b"Authorization: Basic x", b"X-API-Key: secret"), 401),
    "a wrong key before a right one": taken(get(b"/nowhere", b"Authorization: Bearer bad", KEY[:-2]), 401),
    "a line break in a request id": taken(get(b"/livez", b"X-Request-ID: a%0d%0ab")),
    # Bodies
    "more than the limit, announced": refused(HEAD + b"Expect: 100-continue\r\nContent-Length: 3100000\r\n\r\n", 413),
    "an end in the middle of the body": unfinished(length(b"3100")),
    "a compressed body": refused(with_header(b"Content-Encoding: gzip"), 415),
    "450,000 values": taken(sized(b'{"model": "p", "inputs": [' + b'"a",' * 450_000 + b'"a"]}'), 400),
    "one word of 1.9 MB": taken(sized(b'{"model": "p", "inputs": ["' + b"a" * 1_900_000 + b'"]}')),
    "400,000 emoji": taken(sized(b'{"model": "p", "inputs": ["' + "\U0001f600".encode() * 400_000 + b'"]}')),
}


@pytest.fixture(scope="module")
def keyed() -> Iterator[Edge]:
    key = ApiKey(name="k", sha256=hashlib.sha256(b"secret").hexdigest(), scopes=frozenset({"admin"}))
    with serving(RecordingApp(ServingSettings(api_keys=(key,))).app) as edge:
        yield edge


@pytest.fixture(scope="module")
def keyless() -> Iterator[Edge]:
    with serving(RecordingApp().app) as edge:
        yield edge


@dataclass(frozen=True)
class Received:
    status: int
    headers: dict[str, str]
    body: bytes


def responses(raw: bytes, *, has_bodies: bool = True) -> list[Received]:
    """All answers in `raw`, those that ask for more apart."""
    found = []
    while raw:
        head, _, raw = raw.partition(b"\r\n\r\n")
        line, *lines = head.decode("latin-1").split("\r\n")
        version, status, *_ = line.split(" ")
        assert version == "HTTP/1.1", head
        headers = dict(item.split(": ", 1) for item in lines)
        size = int(headers.get("content-length", "0")) if has_bodies else 0
        assert len(raw) >= size
        if status != "100":
            found.append(Received(int(status), headers, raw[:size]))
            raw = raw[size:]
    return found


@pytest.mark.parametrize("name", SHAPES)
def test_a_raw_shape_is_answered_as_it_says(keyed: Edge, name: str) -> None:
    shape = SHAPES[name]
    more = [CANARY] if shape.stays_open else []
    found = responses(keyed.exchange(shape.sent, *more, ends_input=shape.ends_input))
    if shape.stays_open:
        canary = found.pop()
        assert (canary.status, canary.headers["x-request-id"]) == (200, "canary")
    assert tuple(answer.status for answer in found) == shape.statuses
    for answer in found:
        if answer.status >= 400:
            document = json.loads(answer.body)
            assert answer.headers["content-type"] == "application/problem+json"
            assert (document["status"], document["request_id"]) == (answer.status, answer.headers["x-request-id"])


def test_an_old_client_may_send_its_line_alone(keyed: Edge) -> None:
    (answer,) = responses(keyed.exchange(b"GET /livez\r\n\r\n"))
    assert answer.status == 200


# What depends on the name that the client calls us by


@pytest.mark.parametrize("target", [b"/models/", b"/predict/", b"/livez/", b"//evil.example/models/"])
def test_no_answer_sends_a_client_to_the_host_it_named(keyed: Edge, target: bytes) -> None:
    host = b"Host: evil.example\r\n"
    (answer,) = responses(keyed.exchange(get(target, KEY[:-2], b"Connection: close", host=host)))
    assert answer.status == 404
    assert "location" not in answer.headers and b'evil.example/models"' not in answer.body


@pytest.mark.parametrize("target", [b"/metrics", b"/info", b"/models", b"/predict"])
@pytest.mark.parametrize(
    "lines",
    [[b"Host: evil.example:8000"], [b"Host:"], [b"Host: 127.0.0.1", b"Origin: http://evil.example"]],
    ids=["foreign host", "no name", "web page"],
)
def test_without_keys_a_foreign_page_learns_nothing(keyless: Edge, target: bytes, lines: list[bytes]) -> None:
    document = problem_in(keyless.exchange(get(target, *lines, b"Connection: close", host=b"")))
    assert (document["status"], document["code"]) == (403, "forbidden")


@pytest.mark.parametrize("target", [b"/metrics", b"/info"])
@pytest.mark.parametrize("host", [b"127.0.0.1:8000", b"localhost", b"[::1]:8000", b"127.0.0.1 "])
def test_without_keys_this_machine_reads_metrics_and_limits(keyless: Edge, target: bytes, host: bytes) -> None:
    (answer,) = responses(keyless.exchange(get(target, b"Connection: close", host=b"Host: " + host + b"\r\n")))
    assert answer.status == 200


@pytest.mark.parametrize("target", [b"/livez", b"/readyz", b"/health"])
def test_a_probe_may_call_us_by_any_name(keyless: Edge, target: bytes) -> None:
    (answer,) = responses(keyless.exchange(get(target, b"Connection: close", host=b"Host: 10.0.0.7\r\n")))
    assert answer.status == 200


# Probes without a body, bodies with a mark


@pytest.mark.parametrize("target", [b"/livez", b"/readyz", b"/health", b"/info", b"/metrics"])
def test_a_probe_may_ask_for_the_headers_alone(keyed: Edge, target: bytes) -> None:
    whole = get(target, b"Connection: close")
    (answer,) = responses(keyed.exchange(whole))
    (head,) = responses(keyed.exchange(whole.replace(b"GET", b"HEAD", 1)), has_bodies=False)
    assert (head.status, head.headers["content-type"]) == (200, answer.headers["content-type"])


@pytest.mark.parametrize(
    ("target", "body", "status"),
    [
        (b"/predict", BODY, 200),
        (b"/v1/models/p/predict", b'{"inputs": "a"}', 200),
        (b"/v1/embeddings", b'{"model": "p", "input": "a"}', 200),
        (b"/finetune", b'{"dataset": 5}', 422),
        (b"/models/p/rollback", b'{"alias": 5}', 422),
    ],
)
def test_a_byte_order_mark_changes_nothing(keyed: Edge, target: bytes, body: bytes, status: int) -> None:
    """Editors and PowerShell write one before UTF-8; no parser needs it."""
    head = HEAD.replace(b"/predict", target) + b"Connection: close\r\n"
    for content in (body, b"\xef\xbb\xbf" + body):
        (answer,) = responses(keyed.exchange(head + b"Content-Length: %d\r\n\r\n" % len(content) + content))
        assert answer.status == status, answer.body
