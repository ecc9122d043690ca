"""A backbone's encoder under torch: named arrays in, one state per position out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

Tensors = Mapping[str, torch.Tensor]


class Network(Protocol):
    """The torch half of a modality. It has no state: the module is passed in."""

    def load(self, folder: Path, *, dtype: torch.dtype | None = None) -> nn.Module:
        """Load the encoder of a backbone's folder in eval mode on the CPU. Raises `BackboneUnavailable`."""

    def states(self, module: nn.Module, inputs: Tensors) -> torch.Tensor:
        """Return states [rows, positions, hidden]."""

    def mask(self, inputs: Tensors) -> torch.Tensor:
        """Return which positions are a row's own, [rows, positions] of zeros and ones."""

    def example(self, module: nn.Module, *, rows: int, positions: int) -> dict[str, torch.Tensor]:
        """Return inputs to trace the module with, by the names of the graph's inputs and in their order."""

    def axes(self, name: str) -> dict[int, str]:
        """Return which axes of an input are free: `batch` and, for positions, `length`."""
