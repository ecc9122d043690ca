"""(IA)³ with PEFT (Liu et al., NeurIPS 2022): keys, values and the feed-forward's inner states are scaled by learnt
vectors, which are merged into the weights in the end."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from finetune.jobs.failures import RunError
from finetune.training.methods.candidate import Candidate
from finetune.training.methods.own import new_classifier, serve_own
from finetune.training.methods.tuned import Classifier, Serving, start_head, train_tuned
from finetune.training.run_context import Run
from modeling.encoder import load_encoder

_SCALED = ("key", "value", "k_lin", "v_lin", "attn.k", "attn.v", "key_proj", "value_proj")
# The second linear layer of the feed-forward: what enters it is scaled.
_FEED_FORWARD = ("output.dense", "ffn.lin2", "ffn_output")


def train(run: Run) -> Candidate:
    return train_tuned(run, "ia3", "full", partial(_build, run), _serve)


def _build(run: Run) -> Classifier:
    torch.manual_seed(run.plan.seed)
    model = new_classifier(run, with_ia3(load_encoder(run.backbone.folder)))
    start_head(model, run.probe_head)
    return model


def with_ia3(encoder: nn.Module) -> nn.Module:
    from peft import IA3Config, get_peft_model

    linears = [name for name, module in encoder.named_modules() if isinstance(module, nn.Linear)]
    inner = [name for name in linears if _ends(name, _FEED_FORWARD) and "attention.output" not in name]
    scaled = [name for name in linears if _ends(name, _SCALED)]
    if not inner or not scaled:
        hint = "use lora, which changes any linear layer"
        raise RunError("invalid_hyperparameters", "ia3 does not know the layers of this backbone", hint=hint)
    model: nn.Module = get_peft_model(encoder, IA3Config(target_modules=[*scaled, *inner], feedforward_modules=inner))
    return model


def _serve(run: Run, model: Classifier) -> Serving:
    encoder: Any = model.encoder
    model.encoder = encoder.merge_and_unload()
    return serve_own(run, model.encoder, method="ia3")


def _ends(name: str, ends: tuple[str, ...]) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in ends)
