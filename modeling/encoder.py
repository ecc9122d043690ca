"""Encoders from backbone folders, as torch modules; `modeling.backbone` is what can be known without torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open

from modeling.adapters_in_encoder import read_composed
from modeling.backbone import weight_files
from modeling.errors import BackboneUnavailable, CheckpointRefused, UnsupportedArchitecture
from modeling.ingestion import read_config
from modeling.ingestion.text import known_keys, transformers_config

# transformers 5 has no fused attention for the first two, and torch 2.13 cannot export it with T5's position bias.
_EAGER_ONLY = frozenset({"deberta-v2", "mpnet", "t5"})
_ADAPTER_FILE: Final = "adapter_config.json"
_FRACTIONS: Final = ("F64", "F32", "F16", "BF16")
_COUNTERS: Final = ("position_ids", "token_type_ids")  # buffers of old checkpoints, which are not read


# Of checkpoints that were trained with a head of another kind; `pooler` also where the encoder has none of its own.
_HEADS = (
    *("classifier", "cls", "discriminator_predictions", "generator_lm_head", "generator_predictions", "lm_head"),
    *("lm_predictions", "mask_predictions", "pooler", "pre_classifier", "predictions", "qa_outputs", "sop_classifier"),
    *("vocab_layer_norm", "vocab_projector", "vocab_transform", "decoder", "head", "score", "classification_head"),
)


def load_encoder(folder: Path, *, dtype: torch.dtype | None = None, is_whole: bool = False) -> torch.nn.Module:
    """The encoder of a backbone folder in eval mode on the CPU, without its pooler (heads are apart).

    Raises `BackboneUnavailable` where the weights do not fit the configuration.
    """
    encoder = load_pretrained(_auto(folder), folder, dtype=dtype, is_whole=is_whole, may_lack="pooler")
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None
    _give_positions_to_each_row(encoder)
    model: torch.nn.Module = encoder.eval()
    return read_composed(model, folder)


def _give_positions_to_each_row(encoder: torch.nn.Module) -> None:
    """Rotary embeddings of positions alike for all rows are computed once for a batch, and exported that way; ONNX
    Runtime's operator for them wants each row's."""

    def expand(_: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, positions, *others = args
        return (x, positions.expand(x.shape[0], -1), *others)

    for name, module in encoder.named_modules():
        if name.rpartition(".")[2] == "rotary_emb":
            module.register_forward_pre_hook(expand)


def _auto(folder: Path) -> Any:
    """transformers' class for the encoder alone: of T5 it is another than for the whole."""
    from transformers import AutoModel, AutoModelForTextEncoding

    return AutoModelForTextEncoding if read_config(folder)["model_type"] == "t5" else AutoModel


def load_pretrained(
    auto: Any, folder: Path, *, dtype: torch.dtype | None = None, is_whole: bool = False, may_lack: str | None = None
) -> Any:
    """`auto.from_pretrained` with every door closed that a checkpoint could open.

    transformers fills tensors that the file lacks with random numbers, leaves out those that no module takes, and only
    logs it. Here the first is an error, but for the module `may_lack`. `is_whole` is for folders as they arrive: the
    second is an error too, but for heads, and every key of the configuration is taken; and so is a number that is not
    finite. Raises `BackboneUnavailable`, `CheckpointRefused`, and `MemoryError` if there is too little.
    """
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    given = read_config(folder)
    config = transformers_config(given if is_whole else known_keys(given))
    if hasattr(config, "use_cache"):
        config.use_cache = False  # what a decoder would keep to go on writing
    config.return_dict = True  # outputs by name; no answer depends on it
    files = weight_files(folder)
    if is_whole:
        _check_files(files, folder)
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
            ignore_mismatched_sizes=True,  # they are told below, by name
        )
    except Exception as error:  # OSError, ValueError, RuntimeError and safetensors' own, by kind of damage
        if "allocate memory" in str(error):  # torch has no class for it
            raise MemoryError(str(error)) from error
        raise BackboneUnavailable(f"the weights in {folder.name} cannot be loaded ({type(error).__name__})") from error
    modules = {
        key: key.removeprefix(f"{model.base_model_prefix}.").partition(".")[0]
        for key in (*report["missing_keys"], *report["unexpected_keys"])
    }
    missing = sorted(key for key in report["missing_keys"] if modules[key] != may_lack)
    misshapen = sorted(key for key, *_ in report["mismatched_keys"])
    # A head that is built must take all tensors of its name.
    built = {name for part in (model, model.base_model) for name, _ in part.named_children()}
    left_out = {may_lack, *_HEADS} - (built - {may_lack})
    left_over = sorted(key for key in report["unexpected_keys"] if is_whole and modules[key] not in left_out)
    for what, keys in {"lack": missing, "misshape": misshapen, "have no place for": left_over}.items():
        if keys:
            raise BackboneUnavailable(
                f"the weights in {folder.name} and its config.json do not fit: they {what} {len(keys)} tensors, "
                f"{', '.join(keys[:3])}; save model and configuration together with transformers' save_pretrained"
            )
    if is_whole:
        _check_finite(model, folder)
    return model.eval()


def _check_files(files: Sequence[Path], folder: Path) -> None:
    """Raise unless the weights are all there is, and fractions: integers are multiples of scales that nothing reads."""
    if (folder / _ADAPTER_FILE).is_file():
        raise UnsupportedArchitecture(
            f"{folder.name} holds a PEFT adapter ({_ADAPTER_FILE}) beside its weights; merge it into them with "
            "merge_and_unload, or remove it"
        )
    for path in files:
        for name, dtype in _types(path):
            if dtype not in _FRACTIONS and not name.endswith(_COUNTERS):
                raise CheckpointRefused(
                    f"{path.name}: {name} is {dtype}, which cannot be served; save the checkpoint in one of "
                    f"{', '.join(_FRACTIONS)}"
                )


def _types(path: Path) -> list[tuple[str, str]]:
    """Return the tensors of a file by name, with the type that each is stored in."""
    if path.suffix != ".safetensors":
        return []
    try:
        with safe_open(str(path), framework="numpy") as file:
            return [(name, file.get_slice(name).get_dtype()) for name in file.keys()]  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise BackboneUnavailable(
            f"{path.name} is not a complete safetensors file ({str(error)[:200]}); copy the checkpoint again"
        ) from error


def _check_finite(model: torch.nn.Module, folder: Path) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            count = int((~torch.isfinite(tensor)).sum())
            raise CheckpointRefused(
                f"the weights in {folder.name}: {count:,} values of {name} are not finite (NaN or infinite); save the "
                "checkpoint of a training that has not diverged"
            )
