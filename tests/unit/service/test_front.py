"""Front ends without processes: frames by their properties, and a link and an exchange over a real Unix socket."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_registry.errors import ModelNotFound
from model_registry.refs import ModelRef
from modeling.errors import InputTooLong
from service.api.answers import _encoded, timing_headers
from service.api.deps import Services
from service.api.guard import DrainState
from service.api.problems import STATUS_BY_ERROR, problem_for
from service.front import link as link_module
from service.front.configuration import Address
from service.front.engine import Sockets, hold
from service.front.exchange import exchange
from service.front.frames import (
    ERRORS,
    MAX_TOP_K,
    Answered,
    Ask,
    Asked,
    Cancel,
    Count,
    EngineFault,
    FrameReader,
    MalformedFrame,
    Options,
    Result,
    Row,
    Stages,
    decode_answer,
    decode_request,
    error_of,
    failure,
    frame,
)
from service.front.link import EngineLink, make_options
from service.front.proxy import of_the_message, request_headers
from service.front.supervisor import FrontEnds, RestartTimes, restart_delay_s
from service.inference.answering import LabelsPrediction, Prediction, PredictOptions, ValuePrediction
from service.inference.errors import DeadlineExceeded, InferenceFailed, ModelNotReady, ParameterUnfit, QueueFull
from service.inference.predictor import PredictResult, Timings
from service.settings import ServingSettings
from tests.support.answered import rows_of_one_task
from tests.support.asgi import RecordingPredictor

REPOSITORY = Path(__file__).parents[3]
REF = ModelRef("p")
PLAIN = Options(None, None, True, None, False)
LABELS = ("p", "1", "text-classification")

# Frames

texts = st.text(st.characters(codec="utf-8"), max_size=8)
floats = st.floats(0, 1)
refs = st.builds(ModelRef, texts, alias=st.none() | texts, version=st.none() | st.integers(1, 10**9))
vectors = st.lists(st.floats(width=32, allow_nan=False), max_size=5).map(lambda values: np.array(values, np.float32))
results = rows_of_one_task(texts=texts, numbers=floats, vectors=vectors).flatmap(
    lambda answered: st.builds(
        PredictResult,
        model=texts,
        version=st.none() | st.integers(1, 10**9),
        task=st.just(answered[0]),
        predictions=st.just(answered[1]),
        input_tokens=st.integers(0, 2**40),
        engine=texts,
        batch_rows=st.integers(0, 4096),
        timings=st.builds(Timings, floats, floats, floats, floats),
    )
)
requests = st.one_of(
    st.builds(
        Ask,
        st.integers(1, 2**60),
        texts,
        refs,
        st.lists(texts | st.tuples(texts, texts), max_size=4),
        st.builds(
            make_options,
            st.none() | st.integers(1, 10**30),
            st.none() | floats,
            st.booleans(),
            st.none() | st.integers(4, 10**5),
            st.booleans(),
        ),
        st.floats(-10, 3600),
        st.booleans(),
    ),
    st.builds(Cancel, st.integers(1, 2**60)),
    st.builds(Count, st.none() | st.builds(Asked, texts, refs), st.integers(100, 599), floats),
)


def payload(message: Any) -> bytes:
    (found,) = FrameReader(1 << 30).feed(frame(message))
    return found


@given(requests)
def test_requests_come_out_as_they_went_in(message: Any) -> None:
    assert decode_request(payload(message)) == message


@given(results)
def test_a_result_is_answered_like_the_predictor_s_own(result: Any) -> None:
    received = decode_answer(payload(Answered(7, result)))
    assert received.id == 7
    assert without_id(_encoded(received.result)) == without_id(_encoded(result))
    assert timing_headers(received.result) == timing_headers(result)
    for ours, theirs in zip(received.result.predictions, result.predictions, strict=True):
        assert (ours.embedding is None) == (theirs.embedding is None)
        if theirs.embedding is not None:
            assert ours.embedding.tobytes() == theirs.embedding.tobytes()


def without_id(content: bytes) -> dict[str, Any]:
    document: dict[str, Any] = msgspec.json.decode(content)
    return document | {"id": ""}


def test_numbers_of_numpy_become_plain() -> None:
    odd: Any = PredictResult(
        "m",
        1,
        "t",
        [Prediction("a", np.float32(0.5), [("a", np.float64(0.5))], None)],
        np.int64(3),
        "e",
        1,  # type: ignore[arg-type]
        Timings(np.float64(0.1), 0.0, 0.0, 0.0),
    )
    received = decode_answer(payload(Answered(1, odd))).result
    assert (received.predictions[0].score, received.input_tokens, received.timings.queue) == (0.5, 3, 0.1)


def test_the_structs_have_the_fields_of_what_they_mirror() -> None:
    for mirror, original in ((Result, PredictResult), (Stages, Timings), (Options, PredictOptions)):
        assert fields_of(mirror) == [field.name for field in dataclasses.fields(original)]
    answered = (Prediction, LabelsPrediction, ValuePrediction)
    assert set(fields_of(Row)) == {field.name for original in answered for field in dataclasses.fields(original)}


def fields_of(struct: Any) -> list[str]:
    return [field.encode_name for field in msgspec.structs.fields(struct)]


def instances() -> Iterator[Exception]:
    for cls in ERRORS.values():
        if cls.__name__ == "QueueFull":
            yield QueueFull("full", reason="token_budget", retry_after_s=2.5)
        elif cls.__name__ == "ParameterUnfit":
            yield ParameterUnfit("not here", parameter="top_k")
        elif cls.__name__ == "InputTooLong":
            yield InputTooLong("long", index=3)
        elif cls.__name__ == "AliasConflict":
            yield cls("moved", current_version=None)  # type: ignore[call-arg]
        else:
            yield cls("why")
    yield ModelNotReady("soon", retry_after_s=60.0)


@pytest.mark.parametrize("error", instances(), ids=lambda error: type(error).__name__)
def test_an_error_comes_out_as_the_same_class(error: Exception) -> None:
    received = error_of(decode_answer(payload(failure(1, error))))
    assert type(received) is type(error)
    assert (str(received), vars(received)) == (str(error), vars(error))
    ours, theirs = problem_for(received), problem_for(error)
    assert (ours and vars(ours)) == (theirs and vars(theirs))


def test_every_error_that_is_answered_can_cross_or_is_no_prediction_s() -> None:
    crossing = [cls for cls in STATUS_BY_ERROR if cls.__module__.split(".")[0] != "finetune"]
    assert {cls for cls in crossing if ERRORS.get(cls.__name__) is not cls} <= {
        cls for cls in crossing if cls.__name__ == "ImportRefused"
    }


def test_what_has_no_class_stays_inside() -> None:
    class Deeper(ModelNotFound):
        pass

    assert type(error_of(failure(1, Deeper("gone")))) is ModelNotFound
    hidden = failure(1, RuntimeError("the inner secret"))
    assert "secret" not in repr(hidden)
    assert isinstance(error_of(hidden), EngineFault)


@given(st.lists(st.binary(max_size=40), max_size=6), st.data())
def test_frames_are_found_however_the_stream_is_cut(payloads: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(struct.pack("<I", len(payload)) + payload for payload in payloads)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    reader = FrameReader(40)
    found = [
        p for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True) for p in reader.feed(stream[start:end])
    ]
    assert found == payloads


def test_a_frame_is_refused_by_its_length_alone() -> None:
    with pytest.raises(MalformedFrame):
        FrameReader(1000).feed(struct.pack("<I", 1001))


@given(st.binary(max_size=60))
def test_no_payload_does_more_than_fail_to_decode(content: bytes) -> None:
    for decode in (decode_request, decode_answer):
        try:
            decode(content)
        except (msgspec.DecodeError, UnicodeDecodeError):
            pass


def test_labels_beyond_counting_are_all_labels() -> None:
    assert make_options(10**30, None, True, None, False).top_k == MAX_TOP_K


# Link and exchange


class Engine:
    """An exchange over a recording predictor, and a link to it."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "frames.sock")
        self.predictor, self.drain, self.link = RecordingPredictor(), DrainState(), EngineLink(self.path)
        self.counted: list[tuple[Any, int, float]] = []
        self.max_answer_bytes = 1 << 20

    def count_request(self, labels: tuple[str, str, str], *, status: int, seconds: float) -> None:
        self.counted.append((labels, status, seconds))

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        pool: Any = SimpleNamespace(labels_of=lambda tenant, ref: LABELS if ref.name == "p" else ("", "", ""))
        parts: Any = dict.fromkeys(field.name for field in dataclasses.fields(Services)[:-2])
        services = Services(**parts | {"settings": ServingSettings(), "pool": pool, "predictor": self.predictor})
        async with exchange(
            services,
            self.drain,
            self,
            path=self.path,
            max_request_bytes=100_000,
            max_answer_bytes=self.max_answer_bytes,
        ):
            yield

    @asynccontextmanager
    async def linked(self) -> AsyncIterator[EngineLink]:
        task = asyncio.create_task(self.link.run())
        try:
            await asyncio.wait_for(self.link.opened(), 5)
            yield self.link
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def ask(self, *inputs: Any, options: Options = PLAIN, allowed_s: float = 5.0) -> Result:
        return await self.link.predict("t", REF, inputs, options, deadline=time.monotonic() + allowed_s)


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    return Engine(tmp_path)


async def until(is_true: Callable[[], Any]) -> None:
    async with asyncio.timeout(5):
        while not is_true():
            await asyncio.sleep(0.001)


def run(main: Callable[[], Any]) -> None:
    asyncio.run(main())


def test_the_predictor_is_asked_what_the_link_was(engine: Engine) -> None:
    async def main() -> None:
        async with engine.serving(), engine.linked() as link:
            options = make_options(3, 0.5, False, 7, True)
            result = await engine.ask("a", ("b", "c"), options=options)
            await link.predict(
                "u", ModelRef("q", None, 7), ["a"], PLAIN, deadline=time.monotonic() + 5, needs_labels=False
            )
            assert [row.label for row in result.predictions] == ["good", "good"]
            first, second = engine.predictor.asked
            assert (first.tenant, first.ref, first.inputs) == ("t", REF, ["a", ("b", "c")])
            assert first.options == PredictOptions(3, 0.5, False, 7, True) and 4 < first.allowed_s <= 5
            assert (second.tenant, second.ref, second.needs_labels) == ("u", ModelRef("q", None, 7), False)
            await until(lambda: engine.drain.in_flight == 0)

    run(main)


def test_answers_find_their_questions(engine: Engine) -> None:
    async def main() -> None:
        async with engine.serving(), engine.linked():
            found = await asyncio.gather(*(engine.ask(*["a"] * size) for size in range(1, 200)))
            assert [len(result.predictions) for result in found] == list(range(1, 200))

    run(main)


@pytest.mark.parametrize("error", [QueueFull("full", reason="queue_full", retry_after_s=2.0), ModelNotFound("none")])
def test_errors_are_raised_in_the_front_end(engine: Engine, error: Exception) -> None:
    async def main() -> None:
        engine.predictor.error = error
        async with engine.serving(), engine.linked():
            with pytest.raises(type(error)) as raised:
                await engine.ask("a")
            assert vars(raised.value) == vars(error)

    run(main)


def test_a_fault_is_logged_where_it_happened(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        engine.predictor.error = RuntimeError("the inner secret")
        async with engine.serving(), engine.linked():
            with pytest.raises(EngineFault) as raised:
                await engine.ask("a")
            assert "secret" not in str(raised.value)
            assert str(raised.value).split()[-1] in caplog.text  # what joins the two logs

    run(main)
    assert "the inner secret" in caplog.text


def test_a_caller_that_leaves_cancels_the_work(engine: Engine) -> None:
    async def main() -> None:
        engine.predictor.hold = True
        async with engine.serving(), engine.linked():
            asking = asyncio.create_task(engine.ask("a"))
            await until(lambda: engine.predictor.asked)
            assert engine.drain.in_flight == 1
            asking.cancel()
            await until(lambda: engine.predictor.cancelled)
            await until(lambda: engine.drain.in_flight == 0)

    run(main)


def test_an_engine_that_hangs_is_given_up(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        monkeypatch.setattr(link_module, "OVERDUE_S", 0.05)
        engine.predictor.hold = True
        async with engine.serving(), engine.linked():
            with pytest.raises(DeadlineExceeded):
                await engine.ask("a", allowed_s=0.01)
            await until(lambda: engine.predictor.cancelled)

    run(main)


def test_an_engine_that_does_not_read_is_given_up(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        monkeypatch.setattr(link_module, "OVERDUE_S", 0.05)
        with socket.socket(socket.AF_UNIX) as deaf:
            deaf.bind(engine.path)
            deaf.listen()
            async with engine.linked() as link:
                asked = [engine.ask("a" * 2_000_000, allowed_s=0.01) for _ in range(3)]
                found = await asyncio.gather(*asked, return_exceptions=True)
                assert [type(outcome) for outcome in found] == [DeadlineExceeded] * 3
                link.count_request(("", "", ""), status=504, seconds=0.1)
                link.flush()
                assert len(link._waiting_counts) == 1  # kept for later, where their number is bounded

    run(main)


def test_a_lost_connection_fails_what_is_in_flight_and_is_opened_again(engine: Engine) -> None:
    async def main() -> None:
        async with engine.serving(), engine.linked() as link:
            engine.predictor.hold = True
            asking = asyncio.create_task(engine.ask("a"))
            await until(lambda: engine.predictor.asked)
            link._connection.transport.abort()  # type: ignore[union-attr]
            with pytest.raises(ModelNotReady) as raised:
                await asking
            assert raised.value.retry_after_s == 1.0
            with pytest.raises(ModelNotReady):
                await engine.ask("a")
            link.count_request(("", "", ""), status=503, seconds=0.1)
            await until(lambda: engine.predictor.cancelled)
            engine.predictor.hold = False
            await until(lambda: link._connection is not None)
            await engine.ask("a")
            await until(lambda: engine.counted == [(("", "", ""), 503, 0.1)])

    run(main)


def test_counts_get_their_names_in_the_engine_process(engine: Engine) -> None:
    async def main() -> None:
        async with engine.serving(), engine.linked() as link:
            link.count_request(link.labels_of("t", REF), status=200, seconds=0.5)
            link.count_request(("", "", ""), status=401, seconds=0.25)
            await until(lambda: len(engine.counted) == 2)
            assert engine.counted == [(LABELS, 200, 0.5), (("", "", ""), 401, 0.25)]

    run(main)


def test_counts_travel_with_the_next_request(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        monkeypatch.setattr(link_module, "COUNT_WITHIN_S", 60.0)
        async with engine.serving(), engine.linked() as link:
            for status in (200, 404):
                link.count_request(("", "", ""), status=status, seconds=0.5)
            await engine.ask("a")
            assert [status for _, status, _ in engine.counted] == [200, 404]
            link.count_request(("", "", ""), status=503, seconds=0.5)
            link.flush()
            await until(lambda: len(engine.counted) == 3)

    run(main)


def test_an_answer_beyond_the_limit_is_an_error(engine: Engine) -> None:
    async def main() -> None:
        engine.max_answer_bytes = 100
        async with engine.serving(), engine.linked():
            with pytest.raises(InferenceFailed, match="too large"):
                await engine.ask("a", "b")

    run(main)


def same_id_twice() -> bytes:
    return frame(Ask(1, "t", REF, ["a"], PLAIN, 5.0, True)) * 2


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<I", 100_001),
        struct.pack("<I", 3) + b"\xc1\xc1\xc1",
        struct.pack("<I", 0),
        frame(Answered(1, None)),  # type: ignore[arg-type]
        same_id_twice(),
    ],
    ids=["too large", "no MessagePack", "empty", "not for this side", "id in use"],
)
def test_a_malformed_frame_closes_its_connection_alone(engine: Engine, content: bytes) -> None:
    async def main() -> None:
        async with engine.serving(), engine.linked():
            await engine.ask("a")
            reader, writer = await asyncio.open_unix_connection(engine.path)
            writer.write(content)
            with pytest.raises(ConnectionResetError):
                while await asyncio.wait_for(reader.read(100), 5):
                    pass
                raise ConnectionResetError
            writer.close()
            await engine.ask("a")
            await until(lambda: engine.drain.in_flight == 0)

    run(main)


# Headers


def scope_of(headers: list[tuple[bytes, bytes]]) -> dict[str, Any]:
    return {"type": "http", "headers": headers, "state": {"request_id": "r-1"}}


def test_headers_of_a_connection_stay_on_it() -> None:
    given_headers = [
        (b"Connection", b"close, X-Hop"),
        (b"x-hop", b"1"),
        (b"Keep-Alive", b"5"),
        (b"TE", b"gzip"),
        (b"A", b"1 \t"),
        (b"a", b"2"),
        (b"Transfer-Encoding", b"chunked"),
        (b"upgrade", b"h2c"),
    ]
    assert of_the_message(given_headers) == [(b"a", b"1"), (b"a", b"2")]


@pytest.mark.parametrize(
    ("headers", "first", "framing"),
    [
        ([], {"body": b""}, []),
        ([(b"content-length", b"0")], {"body": b""}, [(b"content-length", b"0")]),
        ([(b"content-length", b"3")], {"body": b"abc"}, [(b"content-length", b"3")]),
        ([(b"transfer-encoding", b"chunked")], {"body": b"abc"}, [(b"content-length", b"3")]),
        ([(b"transfer-encoding", b"chunked")], {"body": b"a", "more_body": True}, [(b"transfer-encoding", b"chunked")]),
        ([(b"content-length", b"9")], {"body": b"a", "more_body": True}, [(b"content-length", b"9")]),
    ],
)
def test_a_body_is_framed_by_what_is_known_of_it(headers: Any, first: Any, framing: Any) -> None:
    always = [(b"host", b"h"), (b"authorization", b"Bearer k")]
    passed = request_headers(
        scope_of([*always, (b"x-request-id", b"theirs"), (b"expect", b"100-continue"), *headers]), first
    )
    assert passed == [*always, (b"x-request-id", b"r-1"), *framing]


def test_a_request_without_a_host_gets_one() -> None:
    assert (b"host", b"localhost") in request_headers(scope_of([]), {"body": b""})


# Processes


def test_a_front_end_is_light() -> None:
    heavy = ["torch", "openvino", "onnxruntime", "sqlalchemy", "fastapi", "pydantic", "pyarrow", "tokenizers"]
    code = f"import sys, service.front.front_end; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_front_end_that_is_told_nothing_ends() -> None:
    command = [sys.executable, "-m", "service.front"]
    assert subprocess.run(command, cwd=REPOSITORY, stdin=subprocess.DEVNULL, timeout=60).returncode == 1


def test_the_delay_before_a_restart_grows_to_a_limit() -> None:
    times = RestartTimes(first_delay_s=0.1, longest_delay_s=30.0)
    assert [restart_delay_s(deaths, times) for deaths in (1, 2, 3)] == [0.1, 0.2, 0.4]
    assert restart_delay_s(1000, times) == 30.0


STUB = """
import sys
assert sys.stdin.readline() == "{}\\n"
print("listening", flush=True)
for line in sys.stdin:
    if line == "refuse\\n":
        break
"""


def test_front_ends_are_started_again_told_and_ended() -> None:
    metrics = SimpleNamespace(listening=[], restarts=0)

    def inc() -> None:
        metrics.restarts += 1

    async def main() -> None:
        front_ends = FrontEnds(
            2,
            b"{}",
            environment={},
            listening=SimpleNamespace(set=metrics.listening.append),
            restarts=SimpleNamespace(inc=inc),
            times=RestartTimes(first_delay_s=0.01),
            command=(sys.executable, "-c", STUB),
        )
        assert not front_ends.have_listened()
        async with front_ends.running():
            await until(front_ends.have_listened)
            front_ends._front_ends[0].process.kill()  # type: ignore[union-attr]
            await until(lambda: metrics.restarts == 1 and metrics.listening[-1] == 2)
            assert front_ends.have_listened() and not front_ends.have_ended()
            front_ends.drain()
            front_ends.refuse()
            await until(front_ends.have_ended)
        assert (metrics.restarts, metrics.listening[-1]) == (1, 0)

    run(main)


def test_an_address_in_use_is_refused() -> None:
    with (
        socket.create_server(("127.0.0.1", 0), reuse_port=True) as other,
        pytest.raises(SystemExit, match="cannot listen"),
    ):
        hold("127.0.0.1", other.getsockname()[1])


def test_a_held_address_can_be_listened_on_by_several() -> None:
    ((address, holder),) = hold("127.0.0.1", 0)
    with holder, address.bind() as first, address.bind() as second:
        assert isinstance(address, Address) and address.port > 0
        first.listen()
        second.listen()
        with socket.create_connection((address.host, address.port), timeout=5):
            pass


def test_a_socket_s_path_must_not_be_too_long() -> None:
    with pytest.raises(SystemExit, match="TMPDIR"):
        Sockets(Path("/" + "x" * 110))
