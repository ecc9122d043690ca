"""What a checkpoint's files ask for is computed as transformers and sentence-transformers compute it, or refused by
name. The reference is transformers in fp32, one text at a time, without padding, pooled by hand."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from model_registry.store import FileStore
from modeling import backbone as backbone_module
from modeling.backbone import Backbone, ingest
from modeling.checkpoints import import_classifier
from modeling.encoder import load_encoder
from modeling.engines.protocol import EngineBatch
from modeling.engines.torch import TorchEngine
from modeling.errors import (
    BackboneUnavailable,
    CheckpointRefused,
    ConfigRefused,
    GoldenRowsDiffer,
    ModelingError,
    UnsupportedArchitecture,
)
from modeling.ingestion import READERS, Checkpoint
from modeling.ingestion.text import TextReader, known_keys
from modeling.inputs import open_preprocessor, single
from modeling.testing import write_tiny_checkpoint

TEXTS = ["a good film", "The Plot was DULL, and the actor very bad", "wheat and oil " * 30]
LABELS = ["refund", "praise", "fault"]
DEBERTA: dict[str, Any] = {"model_type": "deberta-v2", "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
DEBERTA |= {"position_biased_input": False, "type_vocab_size": 0}


def taken(folder: Path) -> Backbone:
    return ingest(FileStore(folder.parent / "store"), folder, name="x", source="file:x")


def answers(backbone: Backbone) -> np.ndarray[Any, Any]:
    """[texts, hidden], as an embedding route answers."""
    rows = single(open_preprocessor(backbone).encode(TEXTS))
    vectors = np.concatenate([TorchEngine(backbone).run(EngineBatch([row])).pooled for row in rows])
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True) if backbone.info.normalize else vectors


@torch.inference_mode()
def reference(folder: Path, pooling: str, *, limit: int, lower: bool = False) -> np.ndarray[Any, Any]:
    model = AutoModel.from_pretrained(folder).eval()
    # transformers would build DeBERTa's own tokenizer of the tiny vocabulary, which is another's.
    auto = PreTrainedTokenizerFast if model.config.model_type == "deberta-v2" else AutoTokenizer
    tokenizer = auto.from_pretrained(folder)
    rows = []
    for text in TEXTS:
        encoded = tokenizer(text.lower() if lower else text, truncation=True, max_length=limit, return_tensors="pt")
        states = model(**encoded).last_hidden_state[0]
        rows.append((states[0] if pooling == "cls" else states.mean(0)).numpy())
    return np.stack(rows)


def write(folder: Path, **documents: Any) -> Path:
    """Write JSON files by their names without `.json`; `__` is a folder's end."""
    for name, value in documents.items():
        path = folder / f"{name.replace('__', '/')}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(value))
    return folder


def edit(folder: Path, **values: Any) -> Path:
    return write(folder, config=json.loads((folder / "config.json").read_text()) | values)


def modules(*names: str) -> list[dict[str, Any]]:
    paths = {"Transformer": ""}
    return [
        {"idx": number, "path": paths.get(name, f"{number}_{name}"), "type": f"sentence_transformers.models.{name}"}
        for number, name in enumerate(names)
    ]


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    folder = write_tiny_checkpoint(tmp_path / "plain", seed=5)
    return write(folder, tokenizer_config={"tokenizer_class": "BertTokenizer", "do_lower_case": True})


# --- keys of config.json -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys",
    [
        {"position_buckets": 8, "share_att_key": True, "norm_rel_ebd": "layer_norm"},
        {"norm_rel_ebd": "layer_norm"},
        {"position_buckets": 4},
        {"share_att_key": True},
        {"conv_kernel_size": 3, "conv_act": "gelu", "conv_groups": 2},
        {"pos_att_type": ["c2p"]},
    ],
    ids=lambda keys: ",".join(keys),
)
def test_a_deberta_answers_as_transformers_does(tmp_path: Path, keys: dict[str, Any]) -> None:
    folder = write_tiny_checkpoint(tmp_path / "deberta", seed=1, initializer_range=0.5, **(DEBERTA | keys))
    bare = write_tiny_checkpoint(tmp_path / "bare", seed=1, initializer_range=0.5, **DEBERTA)
    vectors = answers(taken(folder))
    np.testing.assert_allclose(vectors, reference(folder, "mean", limit=66), atol=1e-5)
    assert np.abs(vectors - answers(taken(bare))).max() > 1e-3, "the keys change nothing, so this proves nothing"


@pytest.mark.parametrize("keys", [{"norm_rel_ebd": "layer_norm"}, {"cls_dropout": 0.1, "position_buckets": 8}])
def test_an_imported_deberta_answers_as_transformers_does(tmp_path: Path, keys: dict[str, Any]) -> None:
    folder = write_tiny_checkpoint(tmp_path / "w", labels=LABELS, initializer_range=0.5, **(DEBERTA | keys))
    parts = import_classifier(folder, tmp_path / "parts", name="m", source="file:m")
    rows = single(open_preprocessor(parts.backbone).encode(TEXTS))
    ours = parts.head.logits(TorchEngine(parts.backbone).run(EngineBatch(rows)).pooled)
    whole = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    for place, row in enumerate(rows):
        with torch.inference_mode():
            wanted = whole(**{name: torch.from_numpy(array)[None] for name, array in row.arrays.items()}).logits[0]
        np.testing.assert_allclose(ours[place], wanted.numpy(), atol=1e-4)


@pytest.mark.parametrize("model_type", sorted(READERS["text"].model_types))
def test_every_key_that_transformers_reads_is_kept(model_type: str) -> None:
    name = model_type.replace("-", "_")
    code = Path(transformers.__file__).parent.joinpath("models", name, f"modeling_{name}.py").read_text()
    read = set(re.findall(r'getattr\((?:self\.)?config, *"(\w+)"', code)) - {"num_labels"}
    config = AutoConfig.for_model(model_type).to_dict()
    odd = {key: config.get(key, f"not the default of {key}") for key in read}
    assert known_keys({"model_type": model_type, **odd}).keys() >= read


def test_keys_at_what_the_model_takes_without_them_do_not_change_the_digest(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path / "deberta", **DEBERTA)
    digest = taken(folder).info.digest
    edit(folder, position_buckets=-1, share_att_key=False, norm_rel_ebd="none", conv_kernel_size=0)
    assert taken(folder).info.digest == digest


def test_a_position_embedding_that_transformers_leaves_out_is_refused(plain: Path) -> None:
    taken(edit(plain, position_embedding_type="absolute"))
    with pytest.raises(UnsupportedArchitecture, match="position_embedding_type 'relative_key'"):
        taken(edit(plain, position_embedding_type="relative_key"))


def test_private_keys_that_name_no_code_are_left_out(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path / "w", labels=LABELS)
    edit(folder, _attn_implementation_autoset=True, _anything=None, _number=3)
    parts = import_classifier(folder, tmp_path / "parts", name="m", source="file:m")
    assert not [key for key in json.loads((parts.backbone.folder / "config.json").read_text()) if key.startswith("_")]
    with pytest.raises(ConfigRefused, match="_attn_implementation_autoset"):
        taken(edit(folder, _attn_implementation_autoset="evil/kernel"))
    with pytest.raises(ConfigRefused, match="attn_implementation"):
        taken(edit(folder, _attn_implementation_autoset=True, attn_implementation="evil/kernel"))


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ({"a": "a", "b": "b", "c": "c"}, "config.json"),
        ({"0": "a", "1": ["b"], "2": "c"}, "id2label"),
        ({"0": "a", "1": None, "2": "c"}, "id2label"),
        ({"0": "a", "1": "\ud800", "2": "c"}, "id2label"),
        ({"0": "a", "1": "b\0", "2": "c"}, "id2label"),
        ({"0": "a", "1": " ", "2": "c"}, "id2label"),
        ({"0": "a", "1": "b", "2": "c" * 1001}, "1,001 characters"),
        (["a", "a", "b"], "id2label"),
        (["a", "b"], "do not fit"),
        ("abc", "config.json"),
        ({"1": "a", "2": "b", "3": "c"}, "id2label"),
        ({"0": "a", "1": "a", "2": "b"}, "id2label"),
        ({"0": "a", "1": "", "2": "b"}, "id2label"),
    ],
)
def test_labels_without_a_name_for_each_output_are_refused(tmp_path: Path, labels: Any, says: str) -> None:
    folder = edit(write_tiny_checkpoint(tmp_path / "w", labels=LABELS), id2label=labels)
    with pytest.raises(ModelingError, match=says):
        import_classifier(folder, tmp_path / "parts", name="m", source="file:m")


def test_another_number_of_labels_than_outputs_is_refused_by_the_tensors(tmp_path: Path) -> None:
    folder = edit(write_tiny_checkpoint(tmp_path / "w", labels=LABELS), num_labels=7)
    with pytest.raises(BackboneUnavailable, match=r"misshape 2 tensors, classifier\.bias"):
        import_classifier(folder, tmp_path / "parts", name="m", source="file:m")


@pytest.mark.parametrize(
    ("keys", "labels"),
    [
        ({"id2label": ["x", "y", "z"]}, ("x", "y", "z")),
        ({"id2label": {"2": "z", "0": "x", "1": "y"}}, ("x", "y", "z")),
        ({"id2label": {"0": 1, "1": 2.5, "2": "3"}}, ("1", "2.5", "3")),
        ({"id2label": None, "num_labels": 3}, ("LABEL_0", "LABEL_1", "LABEL_2")),
    ],
)
def test_labels_are_read_as_transformers_reads_them(tmp_path: Path, keys: Any, labels: tuple[str, ...]) -> None:
    folder = edit(write_tiny_checkpoint(tmp_path / "w", labels=LABELS), **keys)
    assert import_classifier(folder, tmp_path / "parts", name="m", source="file:m").labels == labels


# --- numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps is nan"),
        ({"layer_norm_eps": float("inf")}, "layer_norm_eps is inf"),
        ({"layer_norm_eps": -1e-12}, "layer_norm_eps is -1e-12"),
        ({"layer_norm_eps": 0}, "layer_norm_eps is 0"),
        ({"layer_norm_eps": "1e-12"}, "layer_norm_eps is 1e-12"),
        ({"hidden_dropout_prob": float("-inf")}, "hidden_dropout_prob is -inf"),
        ({"extra": {"deep": [1, {"er": float("nan")}]}}, "er is nan"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, more than 1,024"),
        ({"max_position_embeddings": 1 << 40}, "max_position_embeddings"),
        ({"hidden_size": 1e300}, "hidden_size"),
        ({"num_labels": 10**30}, "num_labels"),
    ],
)
def test_numbers_that_no_encoder_can_have_are_refused_by_their_key(plain: Path, keys: Any, says: str) -> None:
    with pytest.raises(CheckpointRefused, match=re.escape(f"config.json: {says}")):
        taken(edit(plain, **keys))


def test_json_nested_too_deep_is_refused(plain: Path) -> None:
    (plain / "config.json").write_text('{"model_type": "bert", "x": ' + "[" * 900 + "1e999" + "]" * 900 + "}")
    with pytest.raises(CheckpointRefused, match="x is inf"):
        taken(plain)
    (plain / "config.json").write_text('{"model_type": "bert", "x": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(BackboneUnavailable, match=r"config\.json is not JSON"):
        taken(plain)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("tensor", ["embeddings.word_embeddings.weight", "encoder.layer.1.output.LayerNorm.bias"])
def test_weights_that_are_not_finite_are_refused_by_their_tensor(plain: Path, tensor: str, value: float) -> None:
    tensors = load_file(plain / "model.safetensors")
    tensors[tensor].view(-1)[7] = value
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointRefused, match=f"1 values of {re.escape(tensor)} are not finite"):
        taken(plain)


def test_finite_weights_whose_answers_are_not_are_refused(plain: Path) -> None:
    tensors = load_file(plain / "model.safetensors")
    tensors["encoder.layer.0.intermediate.dense.weight"].fill_(3e38)
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointRefused, match="states of a plain text are not finite"):
        taken(plain)


def test_what_is_taken_must_compute_what_the_files_compute(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = TextReader._read

    def forgetful(self: TextReader, folder: Path, config: dict[str, Any], has_head: bool) -> Checkpoint:
        kept = wrong(self, folder, config, has_head)
        return replace(kept, config=kept.config | {"hidden_act": "relu"})

    monkeypatch.setattr(TextReader, "_read", forgetful)
    with pytest.raises(GoldenRowsDiffer, match="other states than transformers"):
        taken(plain)


# --- tensors -------------------------------------------------------------------------------------------------------


def rename(folder: Path, **names: str | None) -> Path:
    """Give tensors whose names begin with a key (`__` is a dot) another beginning, or leave them out."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for before, after in names.items():
        start = before.replace("__", ".")
        for key in [key for key in tensors if key.startswith(start)]:
            tensor = tensors.pop(key)
            if after is not None:
                tensors[after + key.removeprefix(start)] = tensor
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def test_tensors_that_the_encoder_has_no_place_for_are_refused_by_name(plain: Path) -> None:
    rename(plain, encoder__layer__1__output__dense="encoder.layer.1.output.extra")
    with pytest.raises(BackboneUnavailable, match=r"lack 2 tensors, encoder\.layer\.1\.output\.dense\.bias"):
        taken(plain)
    tensors = load_file(plain / "model.safetensors")
    tensors |= {key.replace("extra", "dense"): value.clone() for key, value in tensors.items() if "extra" in key}
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BackboneUnavailable, match=r"no place for 2 tensors, encoder\.layer\.1\.output\.extra\.bias"):
        taken(plain)


def test_an_imported_classifier_may_not_leave_encoder_tensors_over(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path / "w", labels=LABELS, num_hidden_layers=3)
    edit(folder, num_hidden_layers=2)
    with pytest.raises(BackboneUnavailable, match=r"no place for 16 tensors, bert\.encoder\.layer\.2\."):
        import_classifier(folder, tmp_path / "parts", name="m", source="file:m")
    rename(edit(folder, num_hidden_layers=3), bert__pooler=None)
    with pytest.raises(BackboneUnavailable, match=r"lack 2 tensors, bert\.pooler\.dense\.bias"):
        import_classifier(folder, tmp_path / "parts", name="m", source="file:m")


def test_poolers_and_position_ids_may_be_missing_or_left_over(plain: Path) -> None:
    vectors = answers(taken(plain))
    np.testing.assert_array_equal(answers(taken(rename(plain, pooler=None))), vectors)
    tensors = load_file(plain / "model.safetensors") | {"embeddings.position_ids": torch.arange(66)[None]}
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    np.testing.assert_array_equal(answers(taken(plain)), vectors)


@pytest.mark.parametrize("head", ["ForPreTraining", "ForMaskedLM", "ForSequenceClassification", "ForQuestionAnswering"])
@pytest.mark.parametrize("model_type", sorted(READERS["text"].model_types))
def test_heads_of_published_checkpoints_are_left_out(tmp_path: Path, model_type: str, head: str) -> None:
    if (model_type, head) == ("qwen3", "ForQuestionAnswering"):
        pytest.skip("transformers gives its encoder another name there, and reads none of it as an encoder either")
    folder = write_tiny_checkpoint(tmp_path / "w", model_type=model_type)
    auto = getattr(transformers, f"AutoModel{head}")
    try:
        model = auto.from_config(AutoConfig.from_pretrained(folder))
    except ValueError:
        pytest.skip(f"transformers has no {head} for {model_type}")
    model.save_pretrained(folder)
    taken(folder)


@pytest.mark.parametrize(("model_type", "tensor"), [("roberta", "classifier.norm.weight"), ("bert", "classifier.gain")])
def test_a_head_with_tensors_left_over_is_refused_by_their_name(tmp_path: Path, model_type: str, tensor: str) -> None:
    folder = write_tiny_checkpoint(tmp_path / "w", model_type=model_type, labels=LABELS)
    tensors = load_file(folder / "model.safetensors") | {tensor: torch.full((32,), 3.0)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BackboneUnavailable, match=re.escape(f"no place for 1 tensors, {tensor}")):
        import_classifier(folder, tmp_path / "parts", name="m", source="file:m")


def test_a_problem_type_that_is_no_text_is_refused(tmp_path: Path) -> None:
    folder = edit(write_tiny_checkpoint(tmp_path / "w", labels=LABELS), problem_type=["regression"])
    with pytest.raises(UnsupportedArchitecture, match=r"problem_type \['regression'\]"):
        import_classifier(folder, tmp_path / "parts", name="m", source="file:m")


@pytest.mark.parametrize("name", ["ModernBertForQuestionAnswering", "BertForMultipleChoice"])
def test_a_head_that_classifies_no_whole_texts_is_refused(tmp_path: Path, name: str) -> None:
    folder = write_tiny_checkpoint(tmp_path / "w", model_type="modernbert", labels=LABELS)
    with pytest.raises(UnsupportedArchitecture, match=name):
        import_classifier(edit(folder, architectures=[name]), tmp_path / "parts", name="m", source="file:m")


def test_a_token_classifier_has_the_tensors_of_a_text_classifier(tmp_path: Path) -> None:
    """It is taken for what its architecture says, and its labels must be tags."""
    folder = write_tiny_checkpoint(tmp_path / "w", model_type="modernbert")
    config = AutoConfig.from_pretrained(folder, id2label=dict(enumerate(LABELS)))
    transformers.AutoModelForTokenClassification.from_config(config).save_pretrained(folder)
    with pytest.raises(UnsupportedArchitecture, match="only a model whose tags are O, B-TYPE and I-TYPE"):
        import_classifier(folder, tmp_path / "parts", name="m", source="file:m")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn], ids=str)
def test_quantised_weights_are_refused_by_their_tensor(plain: Path, dtype: torch.dtype) -> None:
    path, tensor = plain / "model.safetensors", "encoder.layer.0.output.dense.weight"
    tensors = load_file(path)
    save_file(tensors | {tensor: (tensors[tensor] * 100).to(dtype)}, path, metadata={"format": "pt"})
    with pytest.raises(
        CheckpointRefused, match=rf"model\.safetensors: {re.escape(tensor)} is .*save the checkpoint in"
    ):
        taken(plain)


def test_an_adapter_beside_the_weights_is_refused(plain: Path) -> None:
    from peft import LoraConfig, get_peft_model

    expected = answers(taken(plain))
    config = LoraConfig(target_modules=["query"], init_lora_weights=False)
    get_peft_model(AutoModel.from_pretrained(plain), config).save_pretrained(str(plain))
    with pytest.raises(UnsupportedArchitecture, match=r"adapter_config\.json.*merge_and_unload"):
        taken(plain)
    (plain / "adapter_config.json").unlink()
    np.testing.assert_array_equal(answers(taken(plain)), expected)


def test_outputs_without_names_change_no_answer(plain: Path) -> None:
    expected = answers(taken(plain))
    np.testing.assert_array_equal(answers(taken(edit(plain, return_dict=False))), expected)


def test_a_configuration_that_transformers_cannot_compute_with_is_refused(plain: Path) -> None:
    with pytest.raises(CheckpointRefused, match=r"transformers cannot read a plain text .*config\.json"):
        taken(edit(plain, num_attention_heads=-1))


@pytest.mark.parametrize(
    "documents",
    [
        {"tokenizer_config": {"truncation_side": "left"}},
        {"tokenizer": {"truncation": {"direction": "Left", "max_length": 9, "strategy": "LongestFirst", "stride": 0}}},
    ],
    ids=["tokenizer_config", "tokenizer"],
)
def test_a_tokenizer_that_keeps_the_end_of_a_text_is_refused(plain: Path, documents: Any) -> None:
    if "tokenizer" in documents:
        documents = {"tokenizer": json.loads((plain / "tokenizer.json").read_text()) | documents["tokenizer"]}
    with pytest.raises(UnsupportedArchitecture, match=r"truncation_side.*[Ll]eft"):
        taken(write(plain, **documents))


def test_a_stored_backbone_with_tensors_left_over_loads_as_it_did(plain: Path) -> None:
    stored = taken(plain)
    tensors = load_file(stored.folder / "model.safetensors")
    save_file(
        tensors | {"encoder.more": torch.zeros(2)}, stored.folder / "model.safetensors", metadata={"format": "pt"}
    )
    load_encoder(stored.folder)


# --- files of sentence-transformers --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pooling", "mode"),
    [
        ({"pooling_mode": "cls", "embedding_dimension": 32, "include_prompt": True}, "cls"),
        ({"pooling_mode": ["cls"]}, "cls"),
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode": "cls", "pooling_mode_mean_tokens": True}, "cls"),
    ],
)
@pytest.mark.parametrize("normalize", [True, False])
def test_the_vector_is_pooled_as_the_files_say(plain: Path, pooling: Any, mode: str, normalize: bool) -> None:
    names = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    write(plain, modules=modules(*names), **{"1_Pooling__config": pooling})
    backbone = taken(plain)
    wanted = reference(plain, mode, limit=66)
    if normalize:
        wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    assert (backbone.info.pooling, backbone.info.normalize) == (mode, normalize)
    np.testing.assert_allclose(answers(backbone), wanted, atol=1e-5)


TRANSFORMER_OF_5_4 = {
    "transformer_task": "feature-extraction",
    "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
    "module_output_name": "token_embeddings",
}


@pytest.mark.parametrize(
    ("documents", "limit"),
    [
        ({}, 66),
        ({"sentence_bert_config": {"max_seq_length": 20}}, 20),
        ({"sentence_bert_config": {"max_seq_length": None}, "tokenizer_config": {"model_max_length": 24}}, 24),
        ({"sentence_roberta_config": {"max_seq_length": 21}}, 21),
        ({"sentence_bert_config": {"max_seq_length": 20}, "sentence_albert_config": {"max_seq_length": 30}}, 20),
        ({"sentence_bert_config": TRANSFORMER_OF_5_4, "tokenizer_config": {"model_max_length": 24}}, 24),
        ({"sentence_bert_config": {"max_seq_length": 40}, "tokenizer_config": {"model_max_length": 24}}, 40),
        ({"tokenizer_config": {"model_max_length": 10**30}}, 66),
        ({"tokenizer_config": {"model_max_length": 1e30}}, 66),
        ({"sentence_bert_config": {"max_seq_length": 512}}, 66),
        ({"sentence_bert_config": {"max_seq_length": 40, "processor_kwargs": {"model_max_length": 20}}}, 20),
        ({"sentence_mpnet_config": {"max_seq_length": 20}}, 66),
    ],
)
def test_the_limit_is_the_one_of_the_files(plain: Path, documents: Any, limit: int) -> None:
    backbone = taken(write(plain, **documents))
    assert backbone.info.max_length == limit
    np.testing.assert_allclose(answers(backbone), reference(plain, "mean", limit=limit), atol=1e-5)


def test_a_limit_that_changes_nothing_does_not_change_the_digest(plain: Path) -> None:
    digest = taken(plain).info.digest
    assert taken(write(plain, tokenizer_config={"model_max_length": 512})).info.digest == digest


@pytest.mark.parametrize("length", ["long", 0, -1, 2.0, [3]])
def test_limits_that_are_none_are_refused(plain: Path, length: Any) -> None:
    with pytest.raises(BackboneUnavailable, match="limit"):
        taken(write(plain, sentence_bert_config={"max_seq_length": length}))


def normalizer(folder: Path, step: Any) -> Path:
    return write(folder, tokenizer=json.loads((folder / "tokenizer.json").read_text()) | {"normalizer": step})


BERT = {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None}
CASED = BERT | {"lowercase": False}


@pytest.mark.parametrize("step", [CASED, {"type": "NFC"}, None, {"type": "Sequence", "normalizers": [CASED]}])
def test_sentence_transformers_may_ask_for_lower_case(plain: Path, step: Any) -> None:
    normalizer(write(plain, tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast"}), step)
    cased = answers(taken(plain))
    backbone = taken(write(plain, sentence_bert_config={"do_lower_case": True}))
    np.testing.assert_allclose(answers(backbone), reference(plain, "mean", limit=66, lower=True), atol=1e-5)
    assert np.abs(answers(backbone) - cased).max() > 1e-4, "upper case changes nothing, so this proves nothing"


@pytest.mark.parametrize("is_lowered", [True, False])
@pytest.mark.parametrize("says", [True, False])
def test_a_bert_tokenizer_heeds_its_settings(plain: Path, is_lowered: bool, says: bool) -> None:
    normalizer(plain, BERT | {"lowercase": is_lowered})
    before = (plain / "tokenizer.json").read_bytes()
    write(plain, tokenizer_config={"tokenizer_class": "BertTokenizer", "do_lower_case": says})
    backbone = taken(plain)
    np.testing.assert_allclose(answers(backbone), reference(plain, "mean", limit=66), atol=1e-5)
    assert ((backbone.folder / "tokenizer.json").read_bytes() == before) == (is_lowered == says)


def test_a_tokenizer_of_another_class_is_taken_as_it_is(plain: Path) -> None:
    normalizer(write(plain, tokenizer_config={"do_lower_case": True, "tokenizer_class": "XLMRobertaTokenizer"}), None)
    assert (taken(plain).folder / "tokenizer.json").read_bytes() == (plain / "tokenizer.json").read_bytes()


SERVED = modules("Transformer", "Pooling", "Normalize")
MEAN = {"pooling_mode": "mean"}


@pytest.mark.parametrize(
    ("documents", "says"),
    [
        ({"1_Pooling__config": {"pooling_mode": "median"}}, "median"),
        ({"1_Pooling__config": {}}, "1_Pooling/config.json; add it"),
        ({"modules": [*SERVED[:1], SERVED[1] | {"path": "../elsewhere"}]}, "elsewhere"),
        ({"modules": modules("Transformer", "Pooling", "Dense")}, "2_Dense/config.json; add it"),
        ({"modules": modules("Transformer", "Pooling", "LayerNorm")}, "LayerNorm"),
        ({"modules": modules("Transformer", "Normalize", "Pooling")}, "modules.json"),
        ({"modules": [SERVED[0] | {"type": "custom_st.Transformer"}, *SERVED[1:]]}, "custom_st"),
        ({"modules": [SERVED[0] | {"path": "0_Transformer"}, *SERVED[1:]]}, "0_Transformer"),
        ({"modules": {}}, "modules.json holds no list"),
        ({"modules": [1]}, "JSON files of plain"),
        ({"config_sentence_transformers": {"prompts": None, "default_prompt_name": "q"}}, "default_prompt_name"),
        ({"config_sentence_transformers": {"prompts": {"q": 1}}}, "prompts must be"),
        ({"tokenizer": {"normalizer": [1]}}, "JSON files of plain"),
        ({"sentence_bert_config": {"transformer_task": "fill-mask"}}, "fill-mask"),
        ({"sentence_bert_config": {"module_output_name": "sentence_embedding"}}, "module_output_name"),
        ({"sentence_bert_config": {"model_args": {"torch_dtype": "float16"}}}, "model_args"),
        ({"sentence_bert_config": {"processor_kwargs": {"do_lower_case": True}}}, "processor_kwargs"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(plain: Path, documents: Any, says: str) -> None:
    write(plain, **({"modules": SERVED, "1_Pooling__config": MEAN} | documents))
    with pytest.raises(ModelingError, match=says):
        taken(plain)
    assert not (plain.parent / "store" / "backbones").exists()


@pytest.mark.parametrize(("model_type", "says"), [("albert", True), ("deberta-v2", True)], ids=lambda value: str(value))
def test_tokenizer_files_that_contradict_each_other_are_refused(tmp_path: Path, model_type: str, says: bool) -> None:
    folder = normalizer(write_tiny_checkpoint(tmp_path / "w", model_type=model_type), {"type": "NFC"})
    taken(write(folder, tokenizer_config={"do_lower_case": not says}))
    with pytest.raises(UnsupportedArchitecture, match="do_lower_case"):
        taken(write(folder, tokenizer_config={"do_lower_case": says}))


def test_a_tokenizer_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    folder = write(write_tiny_checkpoint(tmp_path / "w", labels=LABELS), tokenizer={"model": {"type": "other"}})
    with pytest.raises(BackboneUnavailable, match=r"tokenizer\.json cannot be read"):
        import_classifier(folder, tmp_path / "parts", name="m", source="file:m")


def test_prompts_that_are_used_only_when_asked_for_do_no_harm(plain: Path) -> None:
    prompts = {"prompts": {"query": "query: ", "document": ""}, "default_prompt_name": None}
    digest = taken(plain).info.digest
    assert taken(write(plain, config_sentence_transformers=prompts)).info.digest == digest
    assert taken(write(plain, config_sentence_transformers=prompts | {"default_prompt_name": "document"})).info


def test_the_files_of_an_imported_classifier_limit_it(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path / "w", labels=LABELS)
    write(folder, tokenizer_config={"model_max_length": 24}, modules=modules("Transformer", "Dense"))
    assert import_classifier(folder, tmp_path / "parts", name="m", source="file:m").backbone.info.max_length == 24


def test_a_schema_that_changed_ingests_anew_and_leaves_what_was_stored(
    plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backbone_module, "_SCHEMA", 1)
    first = taken(plain)
    notes = plain.parent / "store" / "backbones" / "sources"
    monkeypatch.setattr(backbone_module, "_SCHEMA", 2)
    assert taken(plain) == first and len(list(notes.iterdir())) == 2
    monkeypatch.setattr(backbone_module, "_SCHEMA", 3)
    rename(plain, encoder__layer__1__output="encoder.layer.1.elsewhere")
    with pytest.raises(BackboneUnavailable):
        taken(plain)
    assert Backbone.open(first.folder).info == first.info
