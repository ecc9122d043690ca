"""Text encoders of transformers and sentence-transformers: which configuration keys, tokenizer and pooling are kept.

What their files ask for is served as transformers and sentence-transformers serve it, or refused by name.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modeling.errors import BackboneUnavailable, UnsupportedArchitecture
from modeling.ingestion.base import Checkpoint, Pooling, read_config, read_json

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
_CLASSIFIER_KEYS = frozenset({"id2label", "label2id", "problem_type", "architectures"})
_ROBERTA_FAMILY = ("roberta", "xlm-roberta", "camembert")

_MODULES = ("Transformer", "Pooling", "Dropout", "Normalize")  # in this order; dropout does nothing here
_LEGACY_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
# Settings of a Transformer module that change its answers, with the one value that is served; others must be empty.
_SETTINGS = {
    "transformer_task": "feature-extraction",
    "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
    "module_output_name": "token_embeddings",
}
_FREE_SETTINGS = frozenset({"max_seq_length", "do_lower_case", "unpad_inputs"})
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
        {"albert", "bert", "camembert", "deberta-v2", "distilbert", "electra", "mpnet", "roberta", "xlm-roberta"}
    )

    def read(self, folder: Path, config: dict[str, Any], *, has_head: bool = False) -> Checkpoint:
        try:
            return self._read(folder, config, has_head)
        except (AttributeError, KeyError, TypeError) as error:  # JSON, but of another shape than these files have
            raise BackboneUnavailable(
                f"the JSON files of {folder.name} cannot be read: {error}; save it again"
            ) from error

    def _read(self, folder: Path, config: dict[str, Any], has_head: bool) -> Checkpoint:
        kept = known_keys(config)
        full = transformers_config(kept)
        # Position tables of the RoBERTa family start behind the padding index, which MPNet's code sets to 1.
        paddings = {"mpnet": 1, **dict.fromkeys(_ROBERTA_FAMILY, full.pad_token_id or 0)}
        positions = int(full.max_position_embeddings) - paddings.get(full.model_type, -1) - 1
        own = read_json(folder / _OWN_FILE, {})
        settings = _transformer_settings(folder)
        if own:
            pooling, normalize, length = own["pooling"], own["normalize"], own["max_length"]
        else:
            pooling, normalize = ("cls", False) if has_head else _pooling(folder, settings)
            length = _length(folder, settings, positions)
        return Checkpoint(
            config=kept,
            files={"tokenizer.json": _tokenizer(folder, full.model_type, bool(settings.get("do_lower_case")))},
            hidden_size=int(full.hidden_size),
            layers=int(full.num_hidden_layers),
            max_length=min(length or positions, positions),
            pooling=pooling,
            normalize=normalize,
            identity=(pooling, normalize, length),
        )

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


def known_keys(config: dict[str, Any]) -> dict[str, Any]:
    """The keys that the model type's configuration or code reads. Raises `UnsupportedArchitecture`."""
    from transformers import AutoConfig

    positions = config.get("position_embedding_type")
    if positions not in {None, "absolute"}:
        raise UnsupportedArchitecture(
            f"config.json: position_embedding_type {positions!r} is not computed by transformers 5; only absolute is"
        )
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


def _transformer_settings(folder: Path) -> dict[str, Any]:
    """Those of sentence-transformers: of the first file that has any, as it looks for them."""
    files = sorted(
        folder.glob("sentence_*_config.json"), key=lambda path: (path.name != "sentence_bert_config.json", path)
    )
    return next(filter(None, (read_json(path, {}) for path in files)), {})


def _pooling(folder: Path, settings: dict[str, Any]) -> tuple[Pooling, bool]:
    """How sentence-transformers makes a vector of the states, and whether it has length 1. A plain encoder gets the
    mean. Raises `UnsupportedArchitecture` for what is computed otherwise here."""
    modules = read_json(folder / "modules.json", [])
    types = [str(module.get("type")) for module in modules]
    names = [name.rpartition(".")[2] for name in types]
    if names != [name for name in _MODULES if name in names] or any(not t.startswith("sentence_transf") for t in types):
        raise _unserved("modules.json", types, f"{', '.join(_MODULES)} of sentence_transformers, in this order,")
    paths = dict(zip(names, (str(module.get("path", "")) for module in modules), strict=True))
    if paths.get("Transformer", "") not in {"", "."}:
        raise _unserved("modules.json", paths["Transformer"], "a Transformer whose files are beside modules.json")
    odd = {key: value for key, value in settings.items() if value and value != _SETTINGS.get(key)}
    if odd.keys() - _FREE_SETTINGS:
        raise _unserved("sentence_bert_config.json", odd, "an encoder without settings of its own")
    prompts = read_json(folder / "config_sentence_transformers.json", {})
    default = prompts.get("default_prompt_name")
    if default and prompts.get("prompts", {}).get(default) != "":
        raise _unserved("config_sentence_transformers.json", {"default_prompt_name": default}, "no default prompt")
    if "Pooling" in paths:
        return _pooling_mode(folder, paths["Pooling"]), "Normalize" in paths
    return "mean", "Normalize" in paths


def _pooling_mode(folder: Path, path: str) -> Pooling:
    pooling = read_json(folder / path / "config.json", {}) if re.fullmatch(r"[\w-]{1,40}", path) else {}
    if not pooling:
        raise BackboneUnavailable(f"modules.json names {path[:40]!r}, but there is no {path[:40]}/config.json; add it")
    modes = pooling.get("pooling_mode") or [mode for key, mode in _LEGACY_MODES.items() if pooling.get(key)] or "mean"
    match [modes] if isinstance(modes, str) else modes:
        case ["mean" | "cls" as mode]:
            return mode
    raise _unserved(f"{path}/config.json", {"pooling_mode": modes}, "mean or cls alone")


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
    name, lowers = said.get("tokenizer_class") or "", _lowers(before)
    heeds = (name or _LOWER_CASING.get(model_type, "")).startswith(tuple(_LOWER_CASING.values()))
    if before.get("type") == "BertNormalizer" and not name.startswith(_PLAIN_CLASSES):
        after = before | {ours: said[theirs] for theirs, ours in _BERT_SETTINGS.items() if theirs in said}
    elif heeds and said.get("do_lower_case", lowers) != lowers:
        raise _unserved("tokenizer_config.json", {"do_lower_case": not lowers}, "what tokenizer.json does")
    if is_lowered and not _lowers(after):
        after = {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, *([after] if after else [])]}
    if after == before:
        return path.read_bytes()
    return json.dumps(document | {"normalizer": after}, ensure_ascii=False).encode()


def _lowers(step: dict[str, Any]) -> bool:
    inner = step.get("normalizers") or []
    return step.get("type") == "Lowercase" or bool(step.get("lowercase")) or any(map(_lowers, inner))


def _unserved(file: str, found: Any, served: str) -> UnsupportedArchitecture:
    return UnsupportedArchitecture(
        f"{file} asks for {json.dumps(found)[:200]}, which cannot be served; {served} can. Take another checkpoint, or "
        "correct the file if it is wrong"
    )
