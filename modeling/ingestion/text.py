"""Text encoders of transformers and sentence-transformers: which configuration keys, tokenizer and pooling are kept.

What their files ask for is served as transformers and sentence-transformers serve it, or refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from modeling.errors import BackboneUnavailable, UnsupportedArchitecture
from modeling.heads import TaskHead
from modeling.ingestion.base import DENSE_FILE, PROMPTS_FILE, Checkpoint, read_config, read_json
from modeling.ingestion.sentence_transformers import (
    Prompts,
    VectorPlan,
    read_plan,
    read_prompts,
    transformer_settings,
    unserved,
)

if TYPE_CHECKING:
    from modeling.backbone import Backbone

_OWN_FILE = "backbone.json"  # of a folder that was ingested before
# Keys that a model's code reads by `getattr` and its configuration class does not know, and what it takes without them.
_UNLISTED_KEYS: dict[str, dict[str, Any]] = {
    "deberta-v2": {
        "attention_head_size": None,
        "cls_dropout": None,
        "conv_act": "tanh",
        "conv_groups": 1,
        "conv_kernel_size": 0,
        "embedding_size": None,
        "norm_rel_ebd": "none",
        "position_buckets": -1,
        "share_att_key": False,
    }
}
# Their configurations take further keys and translate them, so all are kept but those that say who wrote the file.
_KEPT_WHOLE: Final = frozenset({"modernbert", "nomic_bert", "qwen3", "t5"})
_ORIGIN_KEYS: Final = frozenset({"dtype", "torch_dtype", "transformers_version"})
_CLASSIFIER_KEYS = frozenset({"id2label", "label2id", "problem_type", "architectures"})
_ROBERTA_FAMILY = ("roberta", "xlm-roberta", "camembert")
# Longer texts are cut: an engine is measured and a graph exported up to here.
MOST_POSITIONS: Final = 8192
_RELATIVE_LENGTH: Final = 512  # of an encoder without a table of positions whose files set no limit

# What tokenizer classes make of their settings, by the names in `tokenizer.json`; the others take the file as it is.
_BERT_SETTINGS = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}
_PLAIN_CLASSES = ("PreTrainedTokenizer", "TokenizersBackend")
_LOWER_CASING = {"albert": "Albert", "deberta-v2": "DebertaV2"}


class TextReader:
    # Encoders whose output is a row of token states; each was checked against this loader.
    model_types = frozenset(
        {"albert", "bert", "camembert", "deberta-v2", "distilbert", "electra", "modernbert", "mpnet", "nomic_bert"}
        | {"qwen3", "roberta", "t5", "xlm-roberta"}
    )

    def read(self, folder: Path, config: dict[str, Any], *, has_head: bool = False) -> Checkpoint:
        try:
            return self._read(folder, config, has_head)
        except (AttributeError, KeyError, TypeError, ValueError) as error:  # JSON, but of another shape
            raise BackboneUnavailable(
                f"the JSON files of {folder.name} cannot be read: {error}; save it again"
            ) from error

    def _read(self, folder: Path, config: dict[str, Any], has_head: bool) -> Checkpoint:
        kept = known_keys(config)
        full = transformers_config(kept)
        positions = _positions(full)
        own = read_json(folder / _OWN_FILE, {})
        settings = transformer_settings(folder)
        plan, prompts = VectorPlan(), Prompts()
        if own:
            pooling, normalize, length, width = (own[k] for k in ("pooling", "normalize", "max_length", "hidden_size"))
        else:
            if not has_head:
                plan = read_plan(folder)
                prompts = read_prompts(folder, includes_prompt=plan.includes_prompt)
            pooling, normalize = ("cls", False) if has_head else (plan.pooling, plan.normalize)
            length, width = _length(folder, settings, positions), plan.width(int(full.hidden_size))
        fallback = _RELATIVE_LENGTH if full.model_type == "t5" else positions
        files = _own_files(folder) if own else _vector_files(plan, prompts)
        return Checkpoint(
            config=kept,
            files={"tokenizer.json": _tokenizer(folder, full.model_type, bool(settings.get("do_lower_case"))), **files},
            hidden_size=int(width),
            layers=int(full.num_hidden_layers),
            max_length=min(length or fallback, positions),
            pooling=pooling,
            normalize=normalize,
            identity=(pooling, normalize, length),
            prompts=prompts.by_name,
        )

    def prompts(self, folder: Path) -> Mapping[str, str]:
        return read_prompts(folder, includes_prompt=read_plan(folder).includes_prompt).by_name

    def check_files(self, folder: Path) -> None:
        from modeling.ingestion import text_audit

        text_audit.check_document(folder)

    def check(self, folder: Path, taken: Backbone) -> None:
        from modeling.ingestion import text_audit
        from modeling.proof import check_states

        config = transformers_config(read_config(taken.folder))
        text_audit.audit(
            taken.folder,
            limit=taken.info.max_length,
            vocabulary=int(config.vocab_size),
            types=int(getattr(config, "type_vocab_size", 0) or 0),
        )
        check_states(folder, taken, text_audit.PROBES)


def _positions(config: Any) -> int:
    """How many tokens the encoder takes, at most `MOST_POSITIONS`."""
    # Position tables of the RoBERTa family start behind the padding index, which MPNet's code sets to 1.
    paddings = {"mpnet": 1, **dict.fromkeys(_ROBERTA_FAMILY, config.pad_token_id or 0)}
    table = int(getattr(config, "max_position_embeddings", MOST_POSITIONS))
    return min(table - paddings.get(config.model_type, -1) - 1, MOST_POSITIONS)


def _vector_files(plan: VectorPlan, prompts: Prompts) -> dict[str, bytes]:
    """What a folder keeps of these; prompts that are used only by name change no answer, and are not kept in it."""
    files = {DENSE_FILE: TaskHead(plan.dense).to_bytes()} if plan.dense else {}
    if prompts.default:
        files[PROMPTS_FILE] = prompts_document(prompts.by_name, prompts.default)
    return files


def prompts_document(by_name: Mapping[str, str], default: str) -> bytes:
    return json.dumps({"prompts": dict(by_name), "default": default}, sort_keys=True).encode()


def _own_files(folder: Path) -> dict[str, bytes]:
    paths = (folder / name for name in (DENSE_FILE, PROMPTS_FILE))
    return {path.name: path.read_bytes() for path in paths if path.is_file()}


def known_keys(config: dict[str, Any]) -> dict[str, Any]:
    """The keys that the model type's configuration or code may read. Raises `UnsupportedArchitecture`."""
    from transformers import AutoConfig

    positions = config.get("position_embedding_type")
    if positions not in {None, "absolute"}:
        raise UnsupportedArchitecture(
            f"config.json: position_embedding_type {positions!r} is not computed by transformers 5; only absolute is"
        )
    if config["model_type"] in _KEPT_WHOLE:
        return {key: value for key, value in config.items() if key not in _ORIGIN_KEYS}
    known = set(AutoConfig.for_model(config["model_type"]).to_dict()) | _CLASSIFIER_KEYS
    unlisted = _UNLISTED_KEYS.get(config["model_type"], {})
    return {key: value for key, value in config.items() if key in known or value != unlisted.get(key, value)}


def transformers_config(config: dict[str, Any]) -> Any:
    """What transformers makes of the keys. Raises `BackboneUnavailable` if it makes nothing of them."""
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(**config)
    except Exception as error:  # values that contradict each other or have another type: half a dozen classes
        raise BackboneUnavailable(f"config.json cannot be read by transformers: {str(error)[:300]}") from error


def _length(folder: Path, settings: dict[str, Any], positions: int) -> int | None:
    """The limit that the files set, None if they leave it to the positions."""
    length = settings.get("max_seq_length")
    if length is None:
        length = read_json(folder / "tokenizer_config.json", {}).get("model_max_length")
        if not isinstance(length, int | float) or length >= positions:
            return None
    if not isinstance(length, int | float) or not 3 <= length < 1 << 20:
        raise BackboneUnavailable(
            f"{folder.name}: its files limit texts to {length!r} tokens; write a number from 3 on"
        )
    return int(length)


def _tokenizer(folder: Path, model_type: str, is_lowered: bool) -> bytes:
    """`tokenizer.json`, with the normaliser that `tokenizer_config.json` and sentence-transformers give it."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise BackboneUnavailable(f"{folder.name} has no tokenizer.json; save its tokenizer with the fast class first")
    document = read_json(path, {})
    before = after = document.get("normalizer") or {}
    said = read_json(folder / "tokenizer_config.json", {})
    side = (document.get("truncation") or {}).get("direction") or said.get("truncation_side") or "right"
    if side.lower() != "right":
        raise unserved("the tokenizer", {"truncation_side": side}, "right, which keeps the start of a text,")
    name, lowers = said.get("tokenizer_class") or "", _lowers(before)
    heeds = (name or _LOWER_CASING.get(model_type, "")).startswith(tuple(_LOWER_CASING.values()))
    if before.get("type") == "BertNormalizer" and not name.startswith(_PLAIN_CLASSES):
        after = before | {ours: said[theirs] for theirs, ours in _BERT_SETTINGS.items() if theirs in said}
    elif heeds and said.get("do_lower_case", lowers) != lowers:
        raise unserved("tokenizer_config.json", {"do_lower_case": not lowers}, "what tokenizer.json does")
    if is_lowered and not _lowers(after):
        after = {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, *([after] if after else [])]}
    if after == before:
        return path.read_bytes()
    return json.dumps(document | {"normalizer": after}, ensure_ascii=False).encode()


def _lowers(step: dict[str, Any]) -> bool:
    inner = step.get("normalizers") or []
    return step.get("type") == "Lowercase" or bool(step.get("lowercase")) or any(map(_lowers, inner))
