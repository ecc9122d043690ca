"""Exports of backbones, each made once in a run: seconds of tracing, whatever the size of the weights."""

from __future__ import annotations

import shutil
from pathlib import Path

from filelock import FileLock

from modeling.backbone import Backbone
from modeling.engines.graphs import GraphFiles


class Exports:
    """Called like `export_graphs`, it fills the test's own folder; `shared` belongs to all processes of the run."""

    def __init__(self, shared: Path) -> None:
        self._shared = shared

    def __call__(self, backbone: Backbone, folder: Path, *, has_adapters: bool = True) -> GraphFiles:
        from modeling.export import export_graphs  # and with it torch, which few suites need

        name = f"{backbone.info.digest}-{backbone.info.pooling}-{'lora' if has_adapters else 'bare'}"
        with FileLock(self._shared / f"{name}.lock"):
            made = export_graphs(backbone, self._shared / name, has_adapters=has_adapters)
        shutil.copytree(made.folder, folder, dirs_exist_ok=True)
        return GraphFiles(folder)
