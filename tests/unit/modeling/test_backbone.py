"""What of a checkpoint is taken, and what is refused before any of it is used."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from model_registry.store import FileStore
from modeling.backbone import Backbone, BackboneInfo, ingest, locate
from modeling.encoder import load_encoder
from modeling.errors import BackboneUnavailable, ConfigRefused, UnsupportedArchitecture
from modeling.ingestion import modality_of, read_config
from modeling.ingestion.text import known_keys


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def edit(folder: Path, **values: object) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))
    return folder


@pytest.mark.parametrize(
    "key",
    [
        "auto_map",
        "_attn_implementation_internal",
        "_attn_implementation",
        "custom_pipelines",
        "trust_remote_code",
        "quantization_config",
        "_anything",
    ],
)
def test_keys_that_name_code_are_refused_by_name(copy: Path, key: str) -> None:
    with pytest.raises(ConfigRefused, match=key):
        ingest(FileStore(copy.parent / "store"), edit(copy, **{key: "evil/repo--evil.Evil"}), name="x", source="x")
    assert not (copy.parent / "store" / "backbones").exists()


def test_unknown_keys_are_dropped(copy: Path) -> None:
    assert "surprise" not in known_keys(read_config(edit(copy, surprise=1)))


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "", None, "../bert", 3])
def test_other_architectures_are_refused(copy: Path, model_type: object) -> None:
    with pytest.raises((UnsupportedArchitecture, BackboneUnavailable)):
        modality_of(read_config(edit(copy, model_type=model_type)))


def test_pickled_weights_are_never_loaded(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(BackboneUnavailable, match="pickled"):
        ingest(FileStore(copy.parent / "store"), copy, name="x", source="x")
    with pytest.raises(BackboneUnavailable):
        load_encoder(copy)


def test_a_shard_index_may_name_only_files_beside_it(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    index = {"weight_map": {"a": "../../secret.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BackboneUnavailable, match="beside it"):
        ingest(FileStore(copy.parent / "store"), copy, name="x", source="x")


@pytest.mark.parametrize(
    "index",
    ["[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "[" * 100_000, "no JSON"],
    ids=["list", "empty", "map", "number", "deep", "text"],
)
def test_an_index_of_another_shape_is_refused(copy: Path, index: str) -> None:
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors.index.json").write_text(index)
    with pytest.raises(BackboneUnavailable, match="index"):
        ingest(FileStore(copy.parent / "store"), copy, name="x", source="x")


def test_a_shard_that_is_missing_is_told_by_name(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors.index.json").write_text('{"weight_map": {"a": "part-1.safetensors"}}')
    with pytest.raises(BackboneUnavailable, match=r"part-1\.safetensors cannot be read \(No such file"):
        ingest(FileStore(copy.parent / "store"), copy, name="x", source="x")


@pytest.mark.parametrize("kept", [0, 7, -100])
def test_a_source_whose_weights_are_cut_off_is_refused(copy: Path, kept: int) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(BackboneUnavailable, match=r"model\.safetensors is not a complete safetensors file"):
        ingest(FileStore(copy.parent / "store"), copy, name="x", source="x")


def test_truncated_weights_and_missing_tensors_are_errors(copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = copy / "model.safetensors"
    whole = load_file(path)
    save_file(
        {k: v for k, v in whole.items() if "layer.1.output.dense.weight" not in k}, path, metadata={"format": "pt"}
    )
    with pytest.raises(BackboneUnavailable, match="lack"):
        load_encoder(copy)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BackboneUnavailable):
        load_encoder(copy)


def test_ingesting_twice_gives_the_same_backbone(copy: Path) -> None:
    store = FileStore(copy.parent / "store")
    first = ingest(store, copy, name="x", source="file:x")
    stamp = (first.folder / "model.safetensors").stat().st_mtime_ns
    assert ingest(store, copy, name="x", source="file:x") == first
    assert (first.folder / "model.safetensors").stat().st_mtime_ns == stamp
    assert Backbone.open(first.folder).info == first.info


def test_the_digest_follows_content_and_pooling(copy: Path) -> None:
    store = FileStore(copy.parent / "store")
    plain = ingest(store, copy, name="x", source="x").info
    (copy / "modules.json").write_text(json.dumps([{"type": "sentence_transformers.models.Normalize", "path": "2"}]))
    normalized = ingest(store, copy, name="x", source="x").info
    edit(copy, hidden_dropout_prob=0.3)
    changed = ingest(store, copy, name="x", source="x").info
    assert len({plain.digest, normalized.digest, changed.digest}) == 3
    assert (plain.normalize, normalized.normalize) == (False, True)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("hub:org/name", "commit"),
        ("hub:org/name@main", "commit"),
        ("pkg:no_such_package/model", "not installed"),
        ("pkg:json/model", "no folder"),
        ("file:/no/such/folder", "no such folder"),
        ("s3://bucket", "write pkg:"),
        ("", "write pkg:"),
    ],
)
def test_sources_that_cannot_be_found_say_how_to_mend_it(source: str, says: str) -> None:
    with pytest.raises(BackboneUnavailable, match=says):
        locate(source, offline=True)


def test_offline_the_hub_is_not_asked(tmp_path: Path) -> None:
    with pytest.raises(BackboneUnavailable, match="offline"):
        locate(f"hub:org/name@{'a' * 40}", offline=True, cache_dir=tmp_path)


def test_a_known_source_is_recognised_without_reading_it_anew(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FileStore(tmp_path / "store")
    first = ingest(store, checkpoint, name="one", source="file:one")

    def fail(_: Path) -> None:
        raise AssertionError("read again")

    with monkeypatch.context() as patch:
        patch.setattr("modeling.backbone.read_config", fail)
        again = ingest(store, checkpoint, name="two", source="file:two")
    assert (again.folder, again.info.digest) == (first.folder, first.info.digest)
    assert (again.info.name, again.info.source) == ("two", "file:two")
    changed = tmp_path / "changed"
    shutil.copytree(checkpoint, changed)
    (changed / "sentence_bert_config.json").write_text('{"max_seq_length": 16}')
    assert ingest(store, changed, name="one", source="file:one").info.max_length == 16


def test_the_serving_process_starts_without_torch() -> None:
    """Importing it takes a second and 200 MB, which an engine without torch need not pay at a restart."""
    code = "import sys, service.__main__; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3], timeout=60)


def test_a_fine_tune_runs_like_its_backbone_and_a_larger_one_does_not() -> None:
    base = BackboneInfo(
        digest="a",
        name="minilm",
        source="pkg:a/b",
        model_type="bert",
        hidden_size=384,
        layers=6,
        max_length=256,
        pooling="mean",
        normalize=True,
        parameters=22_713_728,
    )
    without_pooler = 384 * 384 + 384
    tuned = replace(
        base,
        digest="b",
        source="full fine-tune of a",
        max_length=128,
        normalize=False,
        parameters=base.parameters - without_pooler,
    )
    assert tuned.runs_like(base)
    position_ids = 512
    assert replace(tuned, parameters=tuned.parameters - position_ids).runs_like(base)
    adapters = 6 * 2 * 2 * 384 * 64
    assert not replace(tuned, parameters=tuned.parameters + adapters).runs_like(base)
    assert not replace(tuned, model_type="roberta").runs_like(base)
    assert not replace(tuned, hidden_size=768).runs_like(base)
    assert not replace(tuned, layers=12).runs_like(base)
    assert not replace(tuned, pooling="cls").runs_like(base)
