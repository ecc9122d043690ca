"""Tiny random checkpoints for tests: real files in the real formats, with weights that mean nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

WORDS = tuple("the a good bad film plot actor movie is was not very and of it story great dull wheat oil dlrs".split())
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def write_tokenizer(folder: Path) -> int:
    """A WordPiece `tokenizer.json` over a few words and single letters; returns the vocabulary's size."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = [*SPECIALS, *WORDS, *(letter for letter in letters if letter not in WORDS), *(f"##{x}" for x in letters)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return len(vocabulary)


def write_tiny_checkpoint(
    folder: Path, *, model_type: str = "bert", labels: list[str] | None = None, seed: int = 0, **config: Any
) -> Path:
    """A random checkpoint of `model_type`; with `labels` it is a sequence classifier, else a bare encoder."""
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

    folder.mkdir(parents=True, exist_ok=True)
    size = write_tokenizer(folder)
    options: dict[str, Any] = {
        "vocab_size": size,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 66,
        "pad_token_id": 0,
    }
    if model_type == "distilbert":
        options |= {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
        for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
            options.pop(key)
    if model_type in {"albert", "electra"}:
        options["embedding_size"] = 16
    if labels:
        options |= {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    torch.manual_seed(seed)
    full = AutoConfig.for_model(model_type, **(options | config))
    auto = AutoModelForSequenceClassification if labels else AutoModel
    model = auto.from_config(full)  # type: ignore[no-untyped-call]
    model.eval().save_pretrained(folder, safe_serialization=True)
    return folder
