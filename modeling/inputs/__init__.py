"""The modalities by name. A new one is a file here and an entry below, and its encoder an entry in
`modeling.networks`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from modeling.inputs.base import (
    Arrays,
    BadCell,
    Cell,
    Example,
    Features,
    FileReference,
    Modality,
    Preprocessor,
    padded,
    single,
)
from modeling.inputs.text import Text

if TYPE_CHECKING:
    from modeling.backbone import Backbone

__all__ = [
    "MODALITIES",
    "Arrays",
    "BadCell",
    "Cell",
    "Example",
    "Features",
    "FileReference",
    "Modality",
    "Preprocessor",
    "open_preprocessor",
    "padded",
    "single",
]

MODALITIES: Final[dict[str, Modality]] = {"text": Text()}


def open_preprocessor(backbone: Backbone, *, limit: int | None = None) -> Preprocessor:
    """Open what a backbone's rows are made with; `limit` shortens them further than the backbone does."""
    most = backbone.info.max_length
    return MODALITIES[backbone.info.modality].open(backbone.folder, limit=most if limit is None else min(limit, most))
