"""Encoders from backbone folders, as torch modules; `modeling.backbone` is what can be known without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from modeling.adapters_in_encoder import read_composed
from modeling.backbone import read_config, weight_files
from modeling.errors import BackboneUnavailable

_EAGER_ONLY = frozenset({"deberta-v2", "mpnet"})  # no fused attention in transformers 5


def load_encoder(folder: Path, *, dtype: torch.dtype | None = None) -> torch.nn.Module:
    """The encoder of a backbone folder in eval mode on the CPU, without its pooler (heads stand outside).

    Raises `BackboneUnavailable` where the weights do not fit the configuration.
    """
    from transformers import AutoModel

    encoder = load_pretrained(AutoModel, folder, dtype=dtype, may_lack="pooler.")
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None
    model: torch.nn.Module = encoder.eval()
    return read_composed(model, folder)


def load_pretrained(auto: Any, folder: Path, *, dtype: torch.dtype | None = None, may_lack: str | None = None) -> Any:
    """`auto.from_pretrained` with every door closed that a checkpoint could open.

    transformers fills tensors that the file lacks with random numbers and only logs it; here that is
    an error, but for names that begin with `may_lack`. Raises `BackboneUnavailable`.
    """
    import transformers

    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        config = transformers.AutoConfig.for_model(**read_config(folder))
    except ValueError as error:  # values that contradict each other
        raise BackboneUnavailable(f"config.json of {folder.name}: {str(error)[:300]}") from error
    weight_files(folder)
    try:
        model, report = auto.from_pretrained(
            str(folder),
            config=config,
            dtype=dtype or torch.float32,
            attn_implementation="eager" if config.model_type in _EAGER_ONLY else "sdpa",
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # OSError, ValueError, RuntimeError and safetensors' own, by kind of damage
        raise BackboneUnavailable(f"the weights in {folder.name} cannot be loaded ({type(error).__name__})") from error
    missing = sorted(key for key in report["missing_keys"] if may_lack is None or may_lack not in key)
    if missing or report["mismatched_keys"]:
        raise BackboneUnavailable(
            f"the weights in {folder.name} lack or misshape {len(missing)} tensors: {missing[:3]}"
        )
    return model.eval()
