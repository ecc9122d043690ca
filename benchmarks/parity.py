"""Answers of an engine, also of one that was chosen automatically, against torch in fp32 on the test rows of R8.

A linear head is fitted on the reference's vectors of the training rows; both engines' vectors of the test rows go
through it. A flip is a row that gets another label.
"""

from __future__ import annotations

import tempfile
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import datasets, inprocess
from benchmarks.arguments import add_servers, add_shared
from benchmarks.inprocess import batches_by_length
from benchmarks.servers import Spec, started_with_data
from benchmarks.service import write_results
from benchmarks.versions import MAX_LENGTH, Publisher
from modeling.backbone import Backbone
from modeling.engines.torch import TorchEngine
from tests.support.rows import encoded_texts


def add_arguments(parser: ArgumentParser) -> None:
    add_shared(parser, name="parity")
    add_servers(parser, with_peers=False)
    parser.add_argument("--rows", type=int, help="training and test rows at most; default: all")


def run(options: Namespace) -> None:
    rows: list[dict[str, Any]] = []
    train, test = (datasets.r8_rows(options.data, side)[: options.rows] for side in ("train", "test"))
    labels = [row["label"] for row in test]
    with tempfile.TemporaryDirectory(prefix="polyhead-bench-") as folder:
        publisher = Publisher(Path(folder, "reference"))
        publisher.close()
        head = _fit(_reference(publisher.backbone, train), [row["label"] for row in train])
        wanted = _reference(publisher.backbone, test)
        for number, spec in enumerate(options.servers):
            name, got = _vectors(spec, Path(folder, str(number)), test)
            rows.append({"server": spec.label, "engine": name, **compare(head, wanted, got, labels)})
            print(rows[-1], flush=True)
    write_results(options.name, {"benchmark": "parity", "rows": rows})


def compare(head: Any, wanted: Any, got: Any, labels: list[str]) -> dict[str, float]:
    """`head.predict` maps vectors to labels."""
    cosines = (wanted * got).sum(1) / (np.linalg.norm(wanted, axis=1) * np.linalg.norm(got, axis=1))
    answers, reference = head.predict(got), head.predict(wanted)
    return {
        "rows": len(wanted),
        "min_cosine": float(cosines.min()),
        "mean_cosine": float(cosines.mean()),
        "flips": int((answers != reference).sum()),
        "accuracy": float((answers == labels).mean()),
        "reference_accuracy": float((reference == labels).mean()),
    }


def _fit(vectors: Any, labels: list[str]) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=10.0, max_iter=2000).fit(vectors, labels)


def _reference(backbone: Backbone, rows: list[dict[str, Any]]) -> Any:
    """float32[rows, hidden] by torch in fp32, in the order of `rows`."""
    encoded = encoded_texts(backbone.folder, [row["text"] for row in rows], limit=MAX_LENGTH)
    engine = TorchEngine(backbone)
    return _unsorted(encoded, np.concatenate([engine.run(batch).pooled for batch in batches_by_length(encoded)]))


def _vectors(spec: Spec, data_dir: Path, rows: list[dict[str, Any]]) -> tuple[str, Any]:
    """The engine that the service settles on, and its vectors."""
    with started_with_data(spec, data_dir) as server:
        name = server.engine
    with inprocess.opened(spec, data_dir, engine=name) as process:
        encoded = process.encode([row["text"] for row in rows])
        vectors, _ = process.run(batches_by_length(encoded))
    return name, _unsorted(encoded, vectors)


def _unsorted(encoded: Any, vectors: Any) -> Any:
    """`vectors` of inputs in order of length, put back into the order of `encoded`."""
    order = sorted(range(len(encoded)), key=lambda position: encoded[position].cost)
    restored = np.empty_like(vectors)
    restored[order] = vectors
    return restored
