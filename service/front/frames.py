"""What a front end and the engine process say to each other: MessagePack behind four bytes of length, never pickle.

A front end sends `Ask`, `Cancel` and `Count`; the engine process sends `Answered` and `Failed`. Errors travel by the
name of their class and their plain attributes, and come out as the same class. Knows no socket's path and no route.

The socket is the boundary: whoever can connect to it is believed, the tenant in `Ask` included. It lies in a folder
that only this user may enter (`service.front.engine`).
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from types import ModuleType
from typing import Any, Final, cast

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Struct

from model_registry import errors as registry
from model_registry.refs import ModelRef
from modeling import errors as modeling
from service.inference import errors as inference

MAX_ANSWER_BYTES: Final = 256 << 20
MAX_TOP_K: Final = 1 << 31
"""More labels than any model has. MessagePack's integers end at 64 bits, those of a JSON body do not."""
_LENGTH: Final = struct.Struct("<I")


class Options(Struct, frozen=True, array_like=True):
    """The fields of `PredictOptions`, in their order."""

    top_k: int | None
    threshold: float | None
    truncate: bool
    max_length: int | None
    return_embedding: bool


class Ask(Struct, frozen=True, array_like=True, tag=0):
    """Arguments of `Predictor.predict`. `id` is the front end's, unique on its connection; clocks are not shared, so
    the deadline travels as what is left of it."""

    id: int
    tenant: str
    ref: ModelRef
    inputs: list[str | tuple[str, str]]
    options: Options
    remaining_s: float
    needs_labels: bool


class Cancel(Struct, frozen=True, array_like=True, tag=1):
    """Nobody waits for the answer any more."""

    id: int


class Asked(Struct, frozen=True, array_like=True):
    """Whose model a request named. What it is called in metrics only the engine process knows."""

    tenant: str
    ref: ModelRef


class Count(Struct, frozen=True, array_like=True, tag=2):
    """An inference request that the front end answered itself. `asked` is None where it named no model."""

    asked: Asked | None
    status: int
    seconds: float


class Row(Struct, rename={"vector": "embedding"}):
    """As `Prediction`, `LabelsPrediction` or `ValuePrediction`, whose fields it has; `vector` is little-endian
    float32."""

    vector: bytes | None
    label: str | None = None
    score: float | None = None
    scores: list[tuple[str, float]] = []
    labels: list[str] = []
    value: float = 0.0

    @property
    def embedding(self) -> npt.NDArray[np.float32] | None:
        """float32[width], read-only."""
        return None if self.vector is None else np.frombuffer(self.vector, "<f4")


class Stages(Struct):
    """As `Timings`, in seconds."""

    queue: float
    tokenize: float
    inference: float
    total: float


class Result(Struct):
    """As `PredictResult`, which is what the engine process writes in its place."""

    model: str
    version: int | None
    task: str
    predictions: list[Row]
    input_tokens: int
    engine: str
    batch_rows: int
    timings: Stages


class Answered(Struct, frozen=True, array_like=True, tag=0):
    id: int
    result: Result


class Failed(Struct, frozen=True, array_like=True, tag=1):
    """`name` is empty for a fault of ours: it stays in the log of the engine process, under what `message` says."""

    id: int
    name: str = ""
    message: str = ""
    attributes: dict[str, str | int | float | None] = {}


class MalformedFrame(Exception):
    """The other side sent what is no message, or more than it may."""


class EngineFault(Exception):
    """The engine process failed in a way it has no class for; its log says more."""


def _plain(value: Any) -> Any:
    """What MessagePack does not know: vectors as raw little-endian float32, numbers of NumPy as Python's."""
    if isinstance(value, np.ndarray):
        return np.ascontiguousarray(value, "<f4").tobytes()
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot travel in a frame")


_encode = msgspec.msgpack.Encoder(enc_hook=_plain).encode
decode_request: Final = msgspec.msgpack.Decoder(Ask | Cancel | Count).decode
decode_answer: Final = msgspec.msgpack.Decoder(Answered | Failed).decode


def frame(message: Struct) -> bytes:
    """The message as it goes over the socket."""
    payload = _encode(message)
    return _LENGTH.pack(len(payload)) + payload


def _errors_of(module: ModuleType) -> dict[str, type[Exception]]:
    types = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, Exception)]
    return {cls.__name__: cls for cls in types if cls.__module__ == module.__name__}


ERRORS: Final = _errors_of(registry) | _errors_of(modeling) | _errors_of(inference)
"""Classes that cross, by name. A subclass defined elsewhere crosses as its nearest parent here."""


def failure(id_: int, error: Exception) -> Failed:
    for cls in type(error).__mro__:
        if ERRORS.get(cls.__name__) is cls:
            plain = {key: value for key, value in vars(error).items() if isinstance(value, str | int | float | None)}
            return Failed(id_, cls.__name__, str(error), plain)
    return Failed(id_)


def error_of(failed: Failed) -> Exception:
    cls = ERRORS.get(failed.name)
    if cls is None:
        return EngineFault(f"the engine process failed on this request; its log names it fault {failed.message}")
    error = cls.__new__(cls, failed.message)  # the constructors differ; what they set is in the attributes
    vars(error).update(failed.attributes)
    return error


class FrameReader:
    """Cuts a stream of bytes into payloads. Raises `MalformedFrame` on a length above `max_bytes`, before its content
    has come."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        buffer, payloads, start = self._buffer, [], 0
        buffer += data
        while len(buffer) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(buffer, start)
            if length > self._max_bytes:
                raise MalformedFrame(f"a frame of {length} bytes; at most {self._max_bytes} are taken")
            end = start + _LENGTH.size + length
            if end > len(buffer):
                break
            payloads.append(bytes(memoryview(buffer)[start + _LENGTH.size : end]))
            start = end
        del buffer[:start]
        return payloads


class FrameConnection(asyncio.Protocol):
    """One end. `on_message` gets each message, `on_lost` the end, with what was wrong if a frame was."""

    def __init__(
        self,
        decode: Callable[[bytes], Any],
        max_bytes: int,
        *,
        on_message: Callable[[Any], None],
        on_lost: Callable[[MalformedFrame | None], None],
    ) -> None:
        self._decode, self._reader = decode, FrameReader(max_bytes)
        self._on_message, self._on_lost = on_message, on_lost
        self._fault: MalformedFrame | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._writable.set()
        self._on_lost(self._fault)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        try:
            for payload in self._reader.feed(data):
                self._on_message(self._decode(payload))
        except (MalformedFrame, msgspec.DecodeError, UnicodeDecodeError) as error:
            self._fault = MalformedFrame(str(error))
            self.transport.abort()

    def send(self, data: bytes) -> None:
        """Writes frames; to a lost connection nothing."""
        if not self.transport.is_closing():
            self.transport.write(data)

    # Flow: what the other side does not read, we stop producing.

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    @property
    def is_writable(self) -> bool:
        return self._writable.is_set()

    async def writable(self) -> None:
        """Returns once little is waiting to be written, or the connection is lost."""
        if not self._writable.is_set():
            await self._writable.wait()
