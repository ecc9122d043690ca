"""bf16 without autocast: the same gradients within bf16's precision, copies that follow their weights, nothing left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from finetune.training import bf16_cpu
from model_registry.store import FileStore
from modeling.backbone import Backbone, ingest
from modeling.encoder import load_encoder
from modeling.testing import write_tiny_checkpoint


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    folder = tmp_path_factory.mktemp("tiny")
    return ingest(FileStore(folder / "store"), write_tiny_checkpoint(folder / "tiny"), name="tiny", source="file:tiny")


@pytest.fixture(params=["full", "lora", "lora with dropout", "dora"])
def encoder(backbone: Backbone, request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    encoder = load_encoder(backbone.folder)
    for module in encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if request.param != "full":
        from peft import LoraConfig, get_peft_model

        names = [name for name, module in encoder.named_modules() if isinstance(module, nn.Linear)]
        dropout = 0.1 if "dropout" in request.param else 0.0
        options = LoraConfig(r=4, target_modules=names, lora_dropout=dropout, use_dora=request.param == "dora")
        encoder = get_peft_model(encoder, options)
        for name, parameter in encoder.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.05)
    encoder.eval()  # so that LoRA's dropout does not blur the comparison
    return encoder


IDS = torch.randint(5, 30, (6, 11), generator=torch.Generator().manual_seed(1))
MASK = (torch.arange(11) < torch.tensor([[11], [4], [7], [2], [11], [9]])).long()


def gradients(encoder: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    encoder.zero_grad()
    states = encoder(input_ids=IDS, attention_mask=MASK).last_hidden_state.float()
    pooled = (states * MASK[..., None]).sum(1) / MASK.sum(1, keepdim=True)
    (pooled * torch.linspace(-1, 1, pooled.numel()).view_as(pooled)).sum().backward()
    found = {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}
    return pooled.detach(), found


def test_states_and_gradients_are_those_of_fp32_within_bf16(encoder: Any) -> None:
    pooled, expected = gradients(encoder)
    with bf16_cpu.computing(encoder):
        fast, found = gradients(encoder)
    assert not torch.equal(fast, pooled), "nothing was computed in bf16"
    assert torch.nn.functional.cosine_similarity(fast, pooled).min() > 0.999
    assert found.keys() == expected.keys()
    assert all(gradient.dtype == torch.float32 for gradient in found.values())
    mine, theirs = (torch.cat([grads[name].flatten() for name in expected]) for grads in (found, expected))
    assert torch.nn.functional.cosine_similarity(mine, theirs, dim=0) > 0.995
    again, same = gradients(encoder)
    torch.testing.assert_close(again, pooled)
    torch.testing.assert_close(same, expected)


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "rmsprop", "adafactor"])
def test_a_step_of_the_optimiser_reaches_the_copies(encoder: Any, name: str) -> None:
    from finetune.jobs.hyperparameters import parse_hyperparameters
    from finetune.jobs.plan import DatasetProfile, WorkerProfile, resolve
    from finetune.training.optimizers import build_optimizer

    data = DatasetProfile(train_rows=100, validation_rows=10, test_rows=10, labels=4, max_length_p99=20)
    wanted = parse_hyperparameters({"method": "full", "optimizer": name, "learning_rate": 0.5})
    plan = resolve(wanted, data=data, worker=WorkerProfile(), parameters=1, model_max_length=64)
    optimizer = build_optimizer(encoder, plan, plan.methods[0])
    with bf16_cpu.computing(encoder) as copies:
        before, _ = gradients(encoder)
        optimizer.step()
        copies.expire()
        stepped, _ = gradients(encoder)
    assert not torch.equal(before, stepped)
    with bf16_cpu.computing(encoder):
        fresh, _ = gradients(encoder)
    torch.testing.assert_close(stepped, fresh, rtol=0, atol=0)


def test_evaluating_first_does_not_stop_training(encoder: Any) -> None:
    with bf16_cpu.computing(encoder):
        with torch.no_grad():
            encoder(input_ids=IDS, attention_mask=MASK)
        gradients(encoder)


def test_padding_does_not_change_a_row(encoder: Any) -> None:
    with bf16_cpu.computing(encoder), torch.no_grad():
        together = encoder(input_ids=IDS, attention_mask=MASK).last_hidden_state
        alone = encoder(input_ids=IDS[1:2, :4], attention_mask=MASK[1:2, :4]).last_hidden_state
    torch.testing.assert_close(together[1:2, :4].float(), alone.float(), rtol=0.05, atol=0.05)


def test_recomputed_states_give_the_same_gradients(encoder: Any) -> None:
    from finetune.training.loop import _recomputing

    encoder.train()
    if any(isinstance(module, nn.Dropout) and module.p for module in encoder.modules()):
        pytest.skip("dropout draws anew")
    with bf16_cpu.computing(encoder):
        _, expected = gradients(encoder)
        with _recomputing(encoder):
            _, found = gradients(encoder)
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "model_type", ["distilbert", "roberta", "electra", "albert", "mpnet", "deberta-v2", "xlm-roberta"]
)
def test_other_architectures_compute_the_same_within_bf16(tmp_path: Path, model_type: str) -> None:
    checkpoint = write_tiny_checkpoint(tmp_path / "tiny", model_type=model_type)
    backbone = ingest(FileStore(tmp_path / "store"), checkpoint, name="tiny", source="file:tiny")
    encoder = load_encoder(backbone.folder)
    pooled, expected = gradients(encoder)
    with bf16_cpu.computing(encoder):
        fast, found = gradients(encoder)
    assert torch.nn.functional.cosine_similarity(fast, pooled).min() > 0.99
    assert found.keys() == expected.keys()
    mine, theirs = (torch.cat([grads[name].flatten() for name in expected]) for grads in (found, expected))
    assert torch.nn.functional.cosine_similarity(mine, theirs, dim=0) > 0.98
