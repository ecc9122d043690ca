"""Tiny random checkpoints for tests: real files in the real formats, with weights that mean nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

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


Template = tuple[Sequence[str], str, str]
"""Special tokens in the order of their ids, and what a tokenizer writes around one text and around a pair."""
_ROBERTA: Template = (
    ("<s>", "<pad>", "</s>", "<unk>", "<mask>"),
    "<s> $A </s>",
    "<s> $A </s> </s> $B </s>",
)
_BERT: Template = (SPECIALS, "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1")
_T5: Template = (("<pad>", "</s>", "<unk>"), "$A </s>", "$A </s> $B </s>")
_QWEN: Template = (("<|endoftext|>",), "$A <|endoftext|>", "$A $B <|endoftext|>")
# Kind and template of the families whose tokenizers are no WordPiece.
_TOKENIZERS: Final[dict[str, tuple[str, Template]]] = {
    "albert": ("unigram", _BERT),
    "camembert": ("unigram", _ROBERTA),
    "deberta-v2": ("unigram", _BERT),
    "modernbert": ("bytes", _BERT),
    "qwen3": ("bytes", _QWEN),
    "roberta": ("bytes", _ROBERTA),
    "t5": ("unigram", _T5),
    "xlm-roberta": ("unigram", _ROBERTA),
}


def write_own_tokenizer(folder: Path, model_type: str) -> dict[str, int]:
    """Write a tokenizer of the kind that this family has: WordPiece, byte-level BPE or Unigram. Returns `vocab_size`
    and the ids that the configuration needs."""
    if model_type not in _TOKENIZERS:
        return {"vocab_size": write_tokenizer(folder), "pad_token_id": 0}
    from tokenizers import processors

    kind, (specials, single, pair) = _TOKENIZERS[model_type]
    tokenizer = _unigram(specials) if kind == "unigram" else _byte_level(specials)
    tokenizer.add_special_tokens(list(specials))
    ids = {token: index for index, token in enumerate(specials)}
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[(token, ids[token]) for token in specials]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return {"vocab_size": int(tokenizer.get_vocab_size()), "pad_token_id": ids.get("<pad>", 0)}


def _unigram(specials: Sequence[str]) -> Any:
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = dict.fromkeys([*specials, *(f"▁{word}" for word in WORDS), "▁", *letters])
    vocabulary = [(piece, 0.0 if piece in specials else -1.0 - len(pieces) / 100) for piece in pieces]
    unknown = list(pieces).index("<unk>" if "<unk>" in specials else "[UNK]")
    tokenizer = Tokenizer(models.Unigram(vocabulary, unknown, False))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer


def _byte_level(specials: Sequence[str]) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    return tokenizer


# Keys of the configuration by family, where they are other than BERT's; None leaves BERT's out.
_KEYS: Final[dict[str, dict[str, Any]]] = {
    "albert": {"embedding_size": 16},
    "distilbert": {
        **{"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "hidden_size": None, "num_hidden_layers": None},
        **{"num_attention_heads": None, "intermediate_size": None},
    },
    "electra": {"embedding_size": 16},
    "modernbert": {
        **{"local_attention": 8, "num_hidden_layers": 4, "bos_token_id": 2, "cls_token_id": 2, "eos_token_id": 3},
        **{"sep_token_id": 3, "max_position_embeddings": 128},
    },
    "nomic_bert": {"num_hidden_layers": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": None},
    "t5": {
        **{"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "hidden_size": None},
        **{"num_hidden_layers": None, "num_attention_heads": None, "intermediate_size": None},
        **{"max_position_embeddings": None, "decoder_start_token_id": 0},
    },
}


def write_tiny_checkpoint(
    folder: Path,
    *,
    model_type: str = "bert",
    labels: list[str] | None = None,
    seed: int = 0,
    has_own_tokenizer: bool = False,
    **config: Any,
) -> Path:
    """A random checkpoint of `model_type`; with `labels` it is a sequence classifier, else a bare encoder. Its
    tokenizer is a WordPiece unless it `has_own_tokenizer`, of its family's kind."""
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, T5EncoderModel

    folder.mkdir(parents=True, exist_ok=True)
    sizes = (
        write_own_tokenizer(folder, model_type)
        if has_own_tokenizer
        else {"vocab_size": write_tokenizer(folder), "pad_token_id": 0}
    )
    options: dict[str, Any] = {
        **sizes,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 66,
    } | _KEYS.get(model_type, {})
    options = {key: value for key, value in options.items() if value is not None}
    if labels:
        options |= {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    torch.manual_seed(seed)
    full: Any = AutoConfig.for_model(model_type, **(options | config))
    auto: Any = AutoModelForSequenceClassification if labels else AutoModel
    model = T5EncoderModel(full) if model_type == "t5" and not labels else auto.from_config(full)
    model.eval().save_pretrained(folder, safe_serialization=True)
    return folder
