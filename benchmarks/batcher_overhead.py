"""What a text costs between the route and the engine: `python -m benchmarks.batcher_overhead [--base CHECKOUT]`.

CPU time of the process per text through `Predictor`, over an engine that costs nothing, with 64 clients in a closed
loop; `own` replaces the tokenizer as well, so that admission, queue, threads and answers remain. `gap` is how long an
engine that takes 3 ms a run stands still between two runs while work waits.

With `--base` another checkout measures itself, in turns with this one, and the ratio of the medians is printed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from model_registry.db import Database
from model_registry.migrations import migrate
from model_registry.refs import ModelRef
from model_registry.registry import Registry
from model_registry.store import FileStore
from modeling.backbone import ingest
from modeling.engines.fake import FakeEngine
from modeling.engines.protocol import EngineBatch, EngineOutputs
from modeling.tasks import Options
from modeling.testing import write_tiny_checkpoint
from service.inference.capacity import AdmissionController
from service.inference.model_pool import ModelPool
from service.inference.predictor import Predictor
from service.metrics import ServingMetrics
from tests.support.world import World

WIDTH, CLIENTS, RUN_S = 384, 64, 0.003
LABELS = ("acq", "crude", "earn", "grain", "interest", "money-fx", "ship", "trade")
TEXT = "the film is not very good and the plot of it was a dull story"
OPTIONS = Options()

Ask = Callable[[], Awaitable[Any]]


class InstantEngine(FakeEngine):
    """Zeros at no cost, or after `run_s`; keeps how long it stood still before each run."""

    def __init__(self) -> None:
        super().__init__(WIDTH)
        self.run_s = 0.0
        self.gaps_s: list[float] = []
        self._ended = time.perf_counter()

    def run(self, batch: EngineBatch) -> EngineOutputs:
        self.gaps_s.append(time.perf_counter() - self._ended)
        time.sleep(self.run_s)
        self._ended = time.perf_counter()
        return EngineOutputs(np.zeros((len(batch.inputs), WIDTH), dtype=np.float32))


class ConstantPreprocessor:
    """Gives the same tokens for every text."""

    def __init__(self, original: Any) -> None:
        self.max_length = original.max_length
        self._encoded = original.encode([TEXT])[0]

    def encode(self, inputs: Any, **_: Any) -> list[Any]:
        return [self._encoded] * len(inputs)


def measure(*, texts: int, repeats: int) -> dict[str, float]:
    """Median microseconds by case."""
    with tempfile.TemporaryDirectory(prefix="polyhead-bench-") as folder:
        return uvloop.run(_measure(Path(folder), texts, repeats))


async def _measure(folder: Path, texts: int, repeats: int) -> dict[str, float]:
    figures = {}
    engine = InstantEngine()
    async with _pool(folder, engine) as pool:
        admission = AdmissionController(max_inputs=1 << 20, max_queue_delay_s=600)
        predictor = Predictor(admission, ServingMetrics(), max_inputs=256, preprocessor_threads=2)
        lane: Any = pool.engines.lanes()[0]
        tokenizer = lane._preprocessor
        for name, preprocessor in (("with tokenizer", tokenizer), ("own", ConstantPreprocessor(tokenizer))):
            lane._preprocessor = preprocessor
            for size in (1, 32):
                case = f"{size} texts a request, {name}"
                figures[case] = await _cpu_per_text(_ask(pool, predictor, size), size, texts, repeats)
        engine.run_s = RUN_S
        await _closed_loop(_ask(pool, predictor, 1), 4 * CLIENTS)
        engine.gaps_s.clear()
        await _closed_loop(_ask(pool, predictor, 1), 40 * CLIENTS)
        figures["gap, 1 text a request"] = statistics.median(engine.gaps_s) * 1e6
        predictor.close()
    return {name: round(figure, 1) for name, figure in figures.items()}


def _ask(pool: ModelPool, predictor: Predictor, size: int) -> Ask:
    ref, inputs = ModelRef.parse("m"), [TEXT] * size

    async def ask() -> Any:
        model = await pool.find("default", ref)
        return await predictor.predict(model, inputs, OPTIONS, deadline=time.monotonic() + 30)

    return ask


async def _cpu_per_text(ask: Ask, size: int, texts: int, repeats: int) -> float:
    requests = max(texts // size, 2 * CLIENTS)
    await _closed_loop(ask, requests // 4)
    figures = []
    for _ in range(repeats):
        started = time.process_time()
        await _closed_loop(ask, requests)
        figures.append((time.process_time() - started) / (requests * size) * 1e6)
    return statistics.median(figures)


async def _closed_loop(ask: Ask, requests: int) -> None:
    """`CLIENTS` clients, each asking again as soon as it has its answer."""
    left = requests

    async def client() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            await ask()

    await asyncio.gather(*(client() for _ in range(CLIENTS)))


@asynccontextmanager
async def _pool(folder: Path, engine: InstantEngine) -> AsyncIterator[ModelPool]:
    database = Database(f"sqlite:///{folder / 'registry.db'}")
    migrate(database)
    store = FileStore(folder / "store")
    checkpoint = write_tiny_checkpoint(folder / "checkpoint", hidden_size=WIDTH)
    backbone = ingest(store, checkpoint, name="tiny", source="file:tiny")
    world = World(Registry(database), store, backbone, folder, make_engine=lambda _: engine)
    world.publish("m", LABELS)
    async with world.pool() as pool:
        await pool.apply(world.registry.snapshot())
        yield pool
    database.dispose()


def compare(base: Path, *, rounds: int, texts: int, repeats: int) -> dict[str, dict[str, float]]:
    """Both checkouts in turns, each time in a fresh process; medians over the rounds, and their ratio."""
    here = Path(__file__).resolve().parents[1]
    figures: dict[Path, list[dict[str, float]]] = {base: [], here: []}
    for number in range(rounds):
        for checkout in (base, here) if number % 2 == 0 else (here, base):
            # -P: a module beside the file is called like a package
            file = checkout / "benchmarks" / "batcher_overhead.py"
            command = [sys.executable, "-P", str(file), "--json", "--texts", str(texts), "--repeats", str(repeats)]
            output = subprocess.run(
                command, env=os.environ | {"PYTHONPATH": str(checkout)}, check=True, capture_output=True, text=True
            ).stdout
            figures[checkout].append(json.loads(output))
    table = {}
    for name in figures[here][0]:
        before, after = (statistics.median(row[name] for row in figures[checkout]) for checkout in (base, here))
        table[name] = {"base_us": before, "us": after, "ratio": round(before / after, 2)}
    return table


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.batcher_overhead", description=__doc__)
    parser.add_argument("--base", type=Path, help="another checkout to compare with")
    parser.add_argument("--rounds", type=int, default=5, help="turns of both checkouts")
    parser.add_argument("--texts", type=int, default=8192, help="texts of one measurement")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of a case; the median counts")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args()
    sizes = {"texts": options.texts, "repeats": options.repeats}
    if options.base is None:
        table = {name: {"us": value} for name, value in measure(**sizes).items()}
    else:
        table = compare(options.base.resolve(), rounds=options.rounds, **sizes)
    if options.json:
        print(json.dumps({name: row["us"] for name, row in table.items()}))
        return
    columns = list(next(iter(table.values())))
    print(f"{'':40}" + "".join(f"{column:>10}" for column in columns))
    for name, row in table.items():
        print(f"{name:40}" + "".join(f"{row[column]:>10}" for column in columns))


if __name__ == "__main__":
    main()
