"""The torch half of each modality, by its name in `modeling.inputs`."""

from __future__ import annotations

from typing import Final

from modeling.networks.base import Network, Tensors
from modeling.networks.text import TextNetwork

__all__ = ["NETWORKS", "Network", "Tensors"]

NETWORKS: Final[dict[str, Network]] = {"text": TextNetwork()}
