"""Runs the gates that a job asked for, against the champion of this moment.

The outcome is a document: the supervisor acts on it in the transaction that registers the version, and
only if the champion is still the one that was judged against.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from finetune.evaluation import gates
from finetune.evaluation.gates import Gate
from finetune.evaluation.tasks.rules import Contest
from finetune.jobs.link import ChildJob, Link
from finetune.jobs.records import EventType
from finetune.training.methods.candidate import Candidate, Servable
from finetune.training.methods.token_baseline import tagged
from finetune.training.parity import engine_parity
from finetune.training.run_context import Run, embed
from finetune.training.windows import tagged_by
from model_registry.errors import RegistryError
from model_registry.manifest import ModelManifest
from model_registry.store import ArtifactStore, load_manifest
from modeling.assemble import VersionParts, read_version
from modeling.backbone import Backbone
from modeling.engines.build import REFERENCE, EngineOptions, build_engine
from modeling.engines.protocol import Engine
from modeling.errors import BackboneUnavailable, ModelingError
from modeling.heads import TaskHead
from modeling.inputs import Example, open_preprocessor
from modeling.linear_tokens import LinearTokens
from modeling.tasks import Calibration
from modeling.weights import FloatArray

_KEY = "champion"
FINGERPRINT = "data/fingerprint.json"


@dataclass(frozen=True, slots=True)
class Contender:
    """The version that would be champion: as trained, as served, the folder of its weights as written, its answers on
    the test rows and what they mean, its report."""

    best: Candidate
    servable: Servable
    folder: Path
    test_logits: FloatArray | None
    answering: Calibration
    evaluation: dict[str, Any]


def judge(job: ChildJob, run: Run, link: Link, store: ArtifactStore, contender: Contender) -> dict[str, Any] | None:
    """`{wanted, champion, is_passed, gates}`, or None where nothing was asked for. Each gate becomes an event."""
    options = run.plan.gate
    if job.spec.promote == "manual" and options.min_metric is None:
        return None
    pointer = link.champion() if job.spec.promote == "if_better" else None
    judged = []
    if options.min_metric is not None:
        side = "test" if contender.evaluation["test"] else "validation"
        value = contender.evaluation[side][run.plan.metric]
        judged.append(gates.minimum(run.plan.metric, value, least=options.min_metric, side=side))
    if pointer is not None:
        judged += _against(job, run, store, contender, pointer)
    for gate in judged:
        _announce(link, gate)
    return {
        "wanted": job.spec.promote,
        "champion": None if pointer is None else int(pointer["version"]),
        "is_passed": gates.is_passed(judged),
        "gates": [gate.as_dict() for gate in judged],
    }


def _announce(link: Link, gate: Gate) -> None:
    kind: EventType = "gate_failed" if gate.status == "failed" else "gate_passed"
    level = "warn" if gate.status == "failed" else "info"
    link.event(kind, f"{gate.name}: {gate.message}", gate.as_dict(), level=level)


def _against(
    job: ChildJob, run: Run, store: ArtifactStore, contender: Contender, pointer: dict[str, Any]
) -> list[Gate]:
    parity = engine_parity(
        run,
        contender.best,
        contender.servable,
        contender.folder,
        graphs_root=job.graphs_root,
        answering=contender.answering,
    )
    try:
        champion = read_champion(store, run, pointer, tenant=job.tenant, name=job.spec.register_as)
        return [*_duel(run, contender, champion), parity]
    except (RegistryError, ModelingError, OSError) as error:
        message = f"the champion, version {pointer['version']}, cannot be compared with: {error}"[:500]
        return [Gate(run.rules.contest_gate, "failed", message), parity]


def _duel(run: Run, contender: Contender, champion: Champion) -> list[Gate]:
    name = run.rules.contest_gate
    if champion.task != run.plan.task:
        message = f"the champion, version {champion.version}, is for {champion.task}, this version for {run.plan.task}"
        return [Gate(name, "failed", message)]
    seen = frozenset(hash_ for side in (run.train, run.validation) for hash_ in run.row_hashes(side))
    hashes = run.row_hashes(run.test)
    rows, dropped = gates.shared_rows(hashes, seen=seen, champion_seen=champion.seen)
    if contender.test_logits is None or not len(rows):
        return [Gate(name, "failed", _no_rows(champion, len(hashes), dropped), {"rows": 0, "left_out": dropped})]
    contest = Contest(
        targets=run.test.labels[rows],
        names=run.labels,
        outputs=contender.test_logits[rows],
        answering=contender.answering,
        champion_outputs=champion.logits([run.test.examples[row] for row in rows]),
        champion_names=champion.labels,
        champion_answering=champion.answering,
        metric=run.plan.deciding,
        options=run.plan.gate,
        seed=run.plan.seed,
    )
    judged = run.rules.contest(contest)
    return [Gate(gate.name, gate.status, gate.message, {**gate.figures, "left_out": dropped}) for gate in judged]


def _no_rows(champion: Champion, test_rows: int, dropped: dict[str, int]) -> str:
    if champion.seen is None:
        return f"the champion, version {champion.version}, does not tell which rows it was trained on"
    return (
        f"no test row is new to both versions: of {test_rows} the champion was trained or chosen on "
        f"{dropped['seen_by_champion']}; bring a test_dataset that neither has seen"
    )


# The champion as an opponent: read from the store, run as a server would, with what it was trained on


@dataclass(frozen=True, slots=True)
class Champion:
    """`logits` gives the outputs of examples, which mean what `task` and `answering` say. `seen` holds the hashes of
    its training and validation rows, None where the version does not tell."""

    version: int
    labels: tuple[str, ...]
    seen: frozenset[str] | None
    logits: Callable[[Sequence[Example]], Any]
    task: str
    answering: Calibration


def read_champion(store: ArtifactStore, run: Run, pointer: dict[str, Any], *, tenant: str, name: str) -> Champion:
    """`pointer` holds `version` and `manifest_sha256`. Raises `ArtifactError` and `ModelingError` and their kinds."""
    version = int(pointer["version"])
    manifest = load_manifest(store, tenant=tenant, name=name, version=version, sha256=pointer["manifest_sha256"])
    parts = read_version(store, manifest)
    return Champion(
        version,
        manifest.labels,
        _seen(store, manifest),
        _logits(store, run, parts),
        task=manifest.task,
        answering=parts.calibration,
    )


def _seen(store: ArtifactStore, manifest: ModelManifest) -> frozenset[str] | None:
    if FINGERPRINT not in {file.path for file in manifest.files}:
        return None
    path: Path = store.local_path(f"{manifest.prefix}/{FINGERPRINT}")
    hashes = json.loads(path.read_bytes()).get("row_hashes")
    if hashes is None:
        return None
    return frozenset(hashes["train"]) | frozenset(hashes["validation"])


def _logits(store: ArtifactStore, run: Run, parts: VersionParts) -> Callable[[Sequence[Example]], Any]:
    if parts.linear is not None:
        return partial(tagged, parts.linear) if isinstance(parts.linear, LinearTokens) else parts.linear.margins
    head = parts.head
    assert head is not None
    if parts.task.needs == "states":
        return _tagged(store, run, parts, head)
    if parts.backbone is None and parts.adapter is None and _base(store, run, parts) is run.backbone:
        return lambda examples: head.logits(
            run.reference.of(examples, max_length=parts.max_length or run.backbone.info.max_length)
        )
    engine = _engine(store, run, parts)
    preprocessor = open_preprocessor(parts.backbone or _base(store, run, parts), limit=parts.max_length)
    adapter = None
    if parts.adapter is not None:
        engine.load_adapter(_KEY, parts.adapter)
        adapter = _KEY
    return lambda examples: head.logits(embed(engine, preprocessor, examples, adapter=adapter))


def _tagged(store: ArtifactStore, run: Run, parts: VersionParts, head: TaskHead) -> Callable[[Sequence[Example]], Any]:
    engine = _engine(store, run, parts)
    preprocessor = open_preprocessor(parts.backbone or _base(store, run, parts), limit=parts.max_length)
    if parts.adapter is not None:
        engine.load_adapter(_KEY, parts.adapter)
    adapter = _KEY if parts.adapter is not None else None
    return lambda examples: tagged_by(engine, head, preprocessor, examples, adapter)


def _engine(store: ArtifactStore, run: Run, parts: VersionParts) -> Engine:
    backbone = parts.backbone or _base(store, run, parts)
    if backbone is run.backbone:
        return run.reference.engine
    return build_engine(REFERENCE, backbone, None, EngineOptions(run.plan.device))


def _base(store: ArtifactStore, run: Run, parts: VersionParts) -> Backbone:
    base = parts.manifest.base
    if base is None:
        raise BackboneUnavailable("the champion names no backbone")
    if base.digest == run.backbone.info.digest:
        return run.backbone
    return Backbone.open(store.local_path(f"backbones/{base.digest}"))
