"""A data folder as a release leaves it behind: every kind of version of every task, and what each one answers.

    python -m tests.support.data_folder OUT [--checkout FOLDER]

runs the service and the worker of the code in FOLDER (default: this tree) over HTTP alone, trains tiny models, and
writes `folder.tar.xz` and `expected.json` into OUT. `tests/fixtures/data_folder` was written by the code of 32b24a3:

    git worktree add /tmp/start 32b24a3
    python -m tests.support.data_folder tests/fixtures/data_folder --checkout /tmp/start

The processes run inside the folder and name every path relative to it, so that it can be unpacked anywhere. An
exported graph records the paths of the code and of the environment that made it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sqlite3
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from modeling.testing import write_tiny_checkpoint
from tests.acceptance.processes import QUICK, REPOSITORY, Client, Server, Worker, until

ARCHIVE, EXPECTED = "folder.tar.xz", "expected.json"
TEXTS: tuple[str, ...] = (
    "a good film",
    "dull plot and a very bad actor",
    "The STORY is great, and the actor is good!",
    "a",
    ".",
    "  not a bad movie  ",
    "zebra 42!",
    "Ça, c'était très “bon” – 映画 🎬 e\u0301",
    "a great actor of a dull movie and " * 20,
)
PAIRS = (("a good film", "dull plot"), ("the actor", "wheat and oil " * 60))
TASKS = ("text-classification", "text-multi-label", "text-regression")
METHODS = ("baseline", "linear_probe", "lora", "full")
MORE_METHODS = ("setfit", "bottleneck", "prompt_tuning")  # of one label a text alone
IMPORTS: dict[str, tuple[list[str], str | None]] = {
    "imported": (["bad", "good", "mixed"], None),
    "imported-multi-label": (["price", "battery"], "multi_label_classification"),
    "imported-regression": (["value"], "regression"),
}
_TRAINING: dict[str, dict[str, Any]] = {"lora": {"lora": {"r": 2}}}
_UNTRAINED = ("baseline", "linear_probe")
_LEFT_OUT = ("server.log", "worker.log", "data/cache", "data/logs", "data/work")


class DataFolder:
    """An unpacked folder and the processes that run on it, each with the code in `checkout`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._settings = QUICK | {
            "POLYHEAD_DATA_DIR": "data",
            "POLYHEAD_BACKBONES": json.dumps({"tiny": "file:tiny"}),
            "POLYHEAD_IMPORT_ROOT": "imports",
            "POLYHEAD_PRECISION": "fp32",
            # A spare process would import torch beside the ones that are waited for.
            "POLYHEAD_SPARE_PROCESS": "false",
        }

    @classmethod
    def unpack(cls, archive: Path, folder: Path) -> DataFolder:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        return cls(folder)

    def server(self, checkout: Path = REPOSITORY) -> Server:
        return Server(self._settings, self.folder / "server.log", checkout=checkout, cwd=self.folder)

    def worker(self, checkout: Path = REPOSITORY) -> Worker:
        return Worker(self._settings, self.folder / "worker.log", checkout=checkout, cwd=self.folder)

    def write(self, checkout: Path) -> dict[str, Any]:
        """Fill an empty folder; return what `tests.acceptance.test_data_folder` expects of it."""
        write_tiny_checkpoint(self.folder / "tiny")
        for name, (labels, problem) in IMPORTS.items():
            write_tiny_checkpoint(self.folder / "imports" / name, labels=labels, seed=3, problem_type=problem)
        with self.server(checkout) as server, Client(server.wait_ready().url) as client:
            datasets = {task: upload(client, task) for task in TASKS}
            with self.worker(checkout) as worker:
                worker.wait_ready()
                jobs = [submit(client, datasets[task], task, method) for task, method in trained()]
                jobs.append(submit(client, datasets[TASKS[0]], TASKS[0], "linear_probe"))  # a second version
                for job in jobs:
                    client.wait(job, within_s=600)
            for name in IMPORTS:
                response = client.http.post("/models/import", json={"name": name, "source": name})
                assert response.status_code == 201, response.text
            response = client.move_alias(model_name(TASKS[0], "linear_probe"), 2, None, "candidate")
            assert response.status_code == 200, response.text
            queued = submit(client, datasets[TASKS[0]], TASKS[0], "baseline", name="queued")
            return {"queued": queued, "jobs": jobs, "models": models(client), "answers": answers(client)}


def trained() -> Iterator[tuple[str, str]]:
    """Every task with every method that it can be trained by."""
    for task in TASKS:
        for method in (*METHODS, *(MORE_METHODS if task == TASKS[0] else ())):
            yield task, method


def model_name(task: str, method: str) -> str:
    return f"{task.removeprefix('text-')}-{method.replace('_', '-')}"


def models(client: Client) -> dict[str, Any]:
    """What is known of every model but backbones."""
    return {
        model["id"]: {
            "aliases": model["aliases"],
            "versions": [
                {key: version[key] for key in ("version", "status", "task", "labels")}
                for version in client.versions(model["id"])
            ],
        }
        for model in client.get("/models")["data"]
        if model["owned_by"] != "backbone"
    }


def answers(client: Client) -> dict[str, Any]:
    """What every backbone and version answers to `TEXTS` and `PAIRS`: one prediction an input."""
    references = [f"{name}:{one['version']}" for name, model in models(client).items() for one in model["versions"]]
    return {reference: answer(client, reference) for reference in ["tiny", *references]}


def answer(client: Client, reference: str) -> list[dict[str, Any]]:
    """By one version, which may still be loading."""
    options = {} if "baseline" in reference or "queued" in reference else {"return_embedding": True}

    def found() -> list[dict[str, Any]] | None:
        predictions = []
        for inputs in (TEXTS, PAIRS):
            body = {"model": reference, "inputs": inputs, "parameters": options}
            response = client.http.post("/predict", json=body)
            if response.status_code in {404, 503}:
                return None
            assert response.status_code == 200, f"{reference}: {response.text}"
            predictions += response.json()["predictions"]
        return predictions

    return until(found, within_s=60, what=f"answers of {reference}")


def submit(client: Client, dataset: str, task: str, method: str, *, name: str | None = None) -> str:
    training = _TRAINING.get(method, {}) | ({} if method in _UNTRAINED else {"epochs": 1})
    body = {
        "dataset": dataset,
        "backbone": "tiny",
        "task": task,
        "register_as": name or model_name(task, method),
        "hyperparameters": {"method": method, **training},
    }
    response = client.http.post("/finetune", json=body)
    assert response.status_code == 202, response.text
    return str(response.json()["id"])


def upload(client: Client, task: str) -> str:
    dataset = client.upload("\n".join(map(json.dumps, _rows(task))), f"{task}.jsonl")
    assert dataset["status"] == "ready", dataset
    return str(dataset["id"])


def _rows(task: str) -> list[dict[str, Any]]:
    draw, rows = random.Random(task), []
    worth = {"great": 2.0, "good": 1.0, "dull": -1.0, "bad": -2.0}
    topics = {"plot": "story", "cast": "actor", "look": "movie"}
    for number in range(80):
        words, label = draw.choices(list(worth), k=2), [topic for topic in topics if draw.random() < 0.4]
        value = sum(worth[word] for word in words) + draw.gauss(0, 0.2)
        told = [topics[topic] for topic in label]
        text = " ".join([*words, *told, *draw.sample("it was the of very".split(), 3), f"n{number}"])
        wanted: dict[str, Any] = {
            "text-classification": "good" if value > 0 else "bad",
            "text-multi-label": label,
            "text-regression": value,
        }
        rows.append({"text": text, "label": wanted[task]})
    return rows


def pack(folder: Path, archive: Path) -> None:
    """Pack what cannot be made anew: no logs, no caches."""
    for database in folder.glob("data/*.db"):
        with contextlib.closing(sqlite3.connect(database)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def kept(item: tarfile.TarInfo) -> tarfile.TarInfo | None:
        item.uid = item.gid = 0
        item.uname = item.gname = ""
        return None if item.name in _LEFT_OUT else item

    with tarfile.open(archive, "w:xz", preset=9) as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, path.name, filter=kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--checkout", type=Path, default=REPOSITORY)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="polyhead-folder-") as temporary:
        expected = DataFolder(Path(temporary)).write(options.checkout.absolute())
        pack(Path(temporary), options.out / ARCHIVE)
    rounded = json.loads(json.dumps(expected), parse_float=lambda digits: round(float(digits), 8))
    lines = (f" {json.dumps(key)}: {json.dumps(value)}" for key, value in rounded.pop("answers").items())
    text = json.dumps({**rounded, "answers": "ANSWERS"}, indent=1)
    (options.out / EXPECTED).write_text(text.replace('"ANSWERS"', "{\n" + ",\n".join(lines) + "\n}") + "\n")


if __name__ == "__main__":
    main()
