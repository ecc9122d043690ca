"""Every family of encoders on every engine and in every use, against transformers in fp32.

Checkpoints are tiny and random, with a tokenizer of the family's kind. The reference is an unfiltered load by
transformers, one text at a time and without padding; an engine is given the texts together and each alone. The table
goes into docs/encoders.md.
"""

from __future__ import annotations

import logging
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedTokenizerFast, T5EncoderModel

from benchmarks.service import write_results
from model_registry.store import FileStore
from modeling.adapters import Adapter
from modeling.backbone import Backbone, ingest
from modeling.checkpoints import import_classifier, write_encoder
from modeling.encoder import load_encoder
from modeling.engines.build import EngineOptions, EngineSpec, build_engine
from modeling.engines.graphs import GraphFiles
from modeling.engines.protocol import EngineBatch
from modeling.errors import ModelingError
from modeling.export import export_graphs
from modeling.heads import TaskHead
from modeling.ingestion import READERS
from modeling.inputs import open_preprocessor, single
from modeling.inputs.text import takes_type_ids
from modeling.multi_lora import Routing, route
from modeling.networks import NETWORKS
from modeling.testing import write_tiny_checkpoint
from modeling.weights import FloatArray
from tests.support.adapters import random_adapter

FAMILIES: Final = tuple(sorted(READERS["text"].model_types))
ENGINES: Final = {"torch": ("fp32", "bf16"), "onnx": ("fp32",), "openvino": ("fp32", "bf16")}
USES: Final = ("backbone", "import", "lora", "full")
MOST_ERROR, LEAST_COSINE = 1e-4, 0.999
TEXTS: Final[tuple[Any, ...]] = (
    "a good film",
    "The plot was DULL, and the actor very bad!",
    "a",
    ("the movie", "wheat and oil is great"),
    "wheat and oil dlrs " * 60,
)
PAGE = Path(__file__).parents[1] / "docs" / "encoders.md"
_BEGIN, _END = "<!-- families: begin -->", "<!-- families: end -->"

Export = Callable[..., GraphFiles]
"""As `export_graphs`."""


@dataclass(frozen=True, slots=True)
class Cell:
    """What one engine gave in one use: the largest difference in fp32, the smallest cosine of vectors in bf16 if it has
    that, or why it gives nothing."""

    family: str
    engine: str
    use: str
    error: float | None = None
    cosine: float | None = None
    reason: str | None = None

    @property
    def is_equal(self) -> bool:
        has_error = self.error is not None and self.error <= MOST_ERROR
        return has_error and (self.cosine is None or self.cosine >= LEAST_COSINE)


@dataclass(frozen=True, slots=True)
class Case:
    """`wanted` float32[texts, hidden] is what transformers gives for `TEXTS`; of them it makes `logits` float32[texts,
    labels], and the head does the same."""

    backbone: Backbone
    wanted: FloatArray
    adapter: Adapter | None = None
    head: TaskHead | None = None
    logits: FloatArray | None = None


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--name", default="families", help="name of the results' file")
    parser.add_argument("--family", nargs="*", default=list(FAMILIES), choices=FAMILIES)


def run(options: Namespace) -> None:
    cells: list[Cell] = []
    logging.disable(logging.WARNING)
    for family in options.family:
        with tempfile.TemporaryDirectory(prefix="polyhead-families-") as folder:
            cells += measure(family, Path(folder))
        for cell in cells[-len(ENGINES) * len(USES) :]:
            print(asdict(cell), flush=True)
    write_results(options.name, {"benchmark": "families", "rows": [asdict(cell) for cell in cells]})
    if set(options.family) == set(FAMILIES):
        PAGE.write_text(render(PAGE.read_text(), cells))


def measure(
    family: str,
    folder: Path,
    *,
    engines: Sequence[str] = tuple(ENGINES),
    uses: Sequence[str] = USES,
    export: Export = export_graphs,
) -> list[Cell]:
    cases: dict[str, Case | str] = {}
    for use in uses:
        try:
            cases[use] = _MAKERS[use](family, folder)
        except ModelingError as error:
            cases[use] = str(error)
    return [_cell(family, engine, use, cases[use], folder, export) for use in uses for engine in engines]


def _cell(family: str, engine: str, use: str, case: Case | str, folder: Path, export: Export) -> Cell:
    if isinstance(case, str):
        return Cell(family, engine, use, reason=case)
    found: dict[str, list[FloatArray]] = {}
    try:
        has_adapters = use in {"backbone", "lora"}
        files = (
            None
            if engine == "torch"
            else export(case.backbone, folder / f"graphs-{case.backbone.info.digest[:12]}", has_adapters=has_adapters)
        )
        for precision in ENGINES[engine]:
            found[precision] = _answers(EngineSpec(engine, precision), case, files)
    except Exception as error:  # of an exporter or a runtime: half a dozen classes
        return Cell(family, engine, use, reason=f"{type(error).__name__}: {str(error).splitlines()[0][:200]}")
    largest = max(_error(rows, case) for rows in found["fp32"])
    cosines = [_cosine(rows, case.wanted) for rows in found.get("bf16", [])]
    return Cell(family, engine, use, largest, min(cosines, default=None))


def _answers(spec: EngineSpec, case: Case, files: GraphFiles | None) -> list[FloatArray]:
    """Of all texts in one batch, and of each alone."""
    engine = build_engine(spec, case.backbone, files, EngineOptions(threads=1, adapter_slots=2))
    if case.adapter is not None:
        engine.load_adapter("x", case.adapter)
    rows = single(open_preprocessor(case.backbone).encode(TEXTS))
    keys = None if case.adapter is None else ["x"]
    together = engine.run(EngineBatch(rows, keys and keys * len(rows))).pooled
    alone = np.concatenate([engine.run(EngineBatch([row], keys)).pooled for row in rows])
    return [together, alone]


def _error(vectors: FloatArray, case: Case) -> float:
    if case.head is None or case.logits is None:
        return float(np.abs(vectors - case.wanted).max())
    return float(np.abs(case.head.logits(vectors) - case.logits).max())


def _cosine(ours: FloatArray, theirs: FloatArray) -> float:
    lengths = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    return float(((ours * theirs).sum(1) / lengths).min())


# The uses, each with its reference


def _checkpoint(family: str, folder: Path, labels: list[str] | None = None) -> Path:
    spread = {} if family == "t5" else {"initializer_range": 0.1}
    name = folder / f"checkpoint-{'bare' if labels is None else 'classifier'}"
    return write_tiny_checkpoint(name, model_type=family, labels=labels, seed=1, has_own_tokenizer=True, **spread)


def _taken(family: str, folder: Path) -> tuple[Backbone, Any]:
    """A backbone, and the encoder as transformers reads its checkpoint."""
    checkpoint = _checkpoint(family, folder)
    auto: Any = T5EncoderModel if family == "t5" else AutoModel
    backbone = ingest(FileStore(folder / "store"), checkpoint, name=family, source=f"file:{family}")
    return backbone, auto.from_pretrained(checkpoint).eval()


def _as_backbone(family: str, folder: Path) -> Case:
    backbone, whole = _taken(family, folder)
    return Case(backbone, _means(whole, backbone))


def _as_import(family: str, folder: Path) -> Case:
    checkpoint = _checkpoint(family, folder, ["x", "y", "z"])
    parts = import_classifier(checkpoint, folder / "parts", name=family, source=f"file:{family}")
    auto: Any = AutoModelForSequenceClassification
    whole = auto.from_pretrained(checkpoint).eval()
    logits = _over_texts(whole, parts.backbone, lambda arrays: whole(**arrays).logits[0])
    place = -1 if parts.backbone.info.pooling == "lasttoken" else 0
    states = _over_texts(whole, parts.backbone, lambda arrays: whole.base_model(**arrays).last_hidden_state[0, place])
    return Case(parts.backbone, states, head=parts.head, logits=logits)


def _as_lora(family: str, folder: Path) -> Case:
    backbone, whole = _taken(family, folder)
    layout = route(load_encoder(backbone.folder), Routing(), NETWORKS["text"])
    adapter = random_adapter(layout, rank=4, seed=2, scale=0.1)
    with torch.no_grad():
        for name, pair in adapter.pairs.items():
            whole.get_parameter(f"{name}.weight").add_(torch.from_numpy(pair.b @ pair.a))
    return Case(backbone, _means(whole, backbone), adapter=adapter)


def _as_full(family: str, folder: Path) -> Case:
    """Every weight moved a little, as a fine-tune leaves them."""
    backbone, whole = _taken(family, folder)
    encoder, draw = load_encoder(backbone.folder), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
    own = write_encoder(
        folder / "full",
        encoder,
        like=backbone.folder,
        name=family,
        source="full",
        pooling=backbone.info.pooling,
        normalize=False,
    )
    whole.load_state_dict(encoder.state_dict(), strict=False)
    return Case(own, _means(whole, own))


_MAKERS: Final = {"backbone": _as_backbone, "import": _as_import, "lora": _as_lora, "full": _as_full}


def _means(whole: Any, backbone: Backbone) -> FloatArray:
    return _over_texts(whole, backbone, lambda arrays: whole(**arrays).last_hidden_state[0].mean(0))


@torch.inference_mode()
def _over_texts(
    whole: Any, backbone: Backbone, answer: Callable[[dict[str, torch.Tensor]], torch.Tensor]
) -> FloatArray:
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(backbone.folder / "tokenizer.json"))
    takes_types = takes_type_ids({"type_vocab_size": 0, **whole.config.to_dict()})
    rows = []
    for text in TEXTS:
        parts = (text,) if isinstance(text, str) else text
        limits = {"truncation": True, "max_length": backbone.info.max_length}
        encoded = tokenizer(*parts, **limits, return_tensors="pt", return_token_type_ids=takes_types)
        names = ("input_ids", "attention_mask", *(("token_type_ids",) if takes_types else ()))
        rows.append(answer({name: encoded[name] for name in names}).numpy())
    return np.stack(rows)


# The table


def render(page: str, cells: Sequence[Cell]) -> str:
    """The page with its table made anew."""
    before, _, rest = page.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    return f"{before}{_BEGIN}\n\n{table(cells)}\n{_END}{after}"


def table(cells: Sequence[Cell]) -> str:
    """A row per family and engine, a column per use: the largest difference in fp32 and the smallest cosine in bf16."""
    lines = ["| Family | Engine | " + " | ".join(USES) + " |", "|" + "---|" * (2 + len(USES))]
    notes: dict[str, int] = {}
    by_place = {(cell.family, cell.engine, cell.use): cell for cell in cells}
    for family in sorted({cell.family for cell in cells}):
        for engine in ENGINES:
            shown = [_shown(by_place[family, engine, use], notes) for use in USES]
            lines.append(f"| `{family}` | {engine} | " + " | ".join(shown) + " |")
    return "\n".join([*lines, "", *(f"{number}. {reason}" for reason, number in notes.items())]) + "\n"


def _shown(cell: Cell, notes: dict[str, int]) -> str:
    if cell.reason is not None:
        return f"no ({notes.setdefault(cell.reason, len(notes) + 1)})"
    cosine = "" if cell.cosine is None else f", {cell.cosine:.5f}"
    return f"{cell.error:.0e}{cosine}"
