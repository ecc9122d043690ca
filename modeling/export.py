"""torch → ONNX: two graphs per backbone, one without adapters and one that adds each row's LoRA.

Both give the pooled vector and the states of positions: heads are outside, so one export serves every head. The
adapters' weights are inputs, stacked by slot, so one export serves every adapter. No engine needs torch to run it.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from model_registry.logs import errors_alone
from modeling.adapters import LoraLayout
from modeling.backbone import Backbone
from modeling.engines.graphs import POOLED, SLOTS_INPUT, STATES, GraphFiles, a_input, b_input, weights_file
from modeling.engines.torch import Pooler
from modeling.multi_lora import Routing, route
from modeling.networks import NETWORKS

# From 23 on attention is one operator, which both CPU runtimes compute fused: 3 to 25 % less time a batch.
OPSET = 23
_EXAMPLE_SLOTS, _EXAMPLE_RANK, _EXAMPLE_ROWS, _EXAMPLE_LENGTH = 3, 4, 2, 8


def export_graphs(backbone: Backbone, folder: Path, *, has_adapters: bool = True) -> GraphFiles:
    """Writes both graphs into `folder`, with dynamic batch, length, slots and rank; returns at once if they are there.
    Weights of their own take no adapters: without `has_adapters` that graph, as large as the other, is left out.

    The file that `GraphFiles.is_complete` looks for comes last, so that a broken run is done anew.
    """
    files = GraphFiles(folder)
    if files.is_complete:
        return files
    folder.mkdir(parents=True, exist_ok=True)
    _export(_Graph(backbone), files.bare, inputs=[], dynamic=[])
    adapted = _Graph(backbone, is_routed=True)
    if has_adapters:
        names, examples, dynamic = _stack_inputs(adapted.layout)
        _export(adapted, files.lora, inputs=list(zip(names, examples, strict=True)), dynamic=dynamic)
    files.describe(adapted.layout, hidden_size=backbone.info.hidden_size)
    return files


def _export(
    graph: _Graph, target: Path, *, inputs: Sequence[tuple[str, torch.Tensor]], dynamic: Sequence[dict[int, Any]]
) -> None:
    axes = {"batch": torch.export.Dim("batch", min=1, max=4096), "length": torch.export.Dim("length", min=2, max=8192)}
    shapes: list[Any] = [{axis: axes[kind] for axis, kind in graph.network.axes(name).items()} for name in graph.inputs]
    shapes += [{0: axes["batch"]}, *dynamic] if inputs else []
    examples = (*graph.inputs.values(), *(example for _, example in inputs))
    # The exporter logs its progress as warnings; only its failures are of interest.
    with warnings.catch_warnings(), errors_alone("torch.onnx", "onnxscript", "torch.export"):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            graph,
            examples,
            dynamo=True,
            input_names=[*graph.inputs, *(name for name, _ in inputs)],
            output_names=[POOLED, STATES],
            dynamic_shapes=(tuple(shapes),),  # of `*more`
            external_data=False,
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None
    with tempfile.TemporaryDirectory(dir=target.parent, suffix=".partial") as folder:
        written = Path(folder, target.name)
        program.save(str(written), external_data=True)
        for path in (weights_file(written), written):
            if path.is_file():
                path.replace(target.with_name(path.name))


def _stack_inputs(layout: LoraLayout) -> tuple[list[str], list[torch.Tensor], list[dict[int, Any]]]:
    """Names, examples and dynamic axes of the slots and of each group's stacks; every group has a rank of its own."""
    slots = torch.export.Dim("slots", min=2, max=1 << 16)
    names, examples = [SLOTS_INPUT], [torch.zeros(_EXAMPLE_ROWS, dtype=torch.int64)]
    dynamic: list[dict[int, Any]] = []
    for number, group in enumerate(layout.groups):
        rank = torch.export.Dim(f"rank{number}", min=1, max=4096)
        count = len(group.linears)
        names.append(a_input(number))
        examples.append(torch.zeros(_EXAMPLE_SLOTS, group.in_features, count * _EXAMPLE_RANK))
        dynamic.append({0: slots, 2: rank if count == 1 else count * rank})
        for index, (_, out_features) in enumerate(group.linears):
            names.append(b_input(number, index))
            examples.append(torch.zeros(_EXAMPLE_SLOTS, _EXAMPLE_RANK, out_features))
            dynamic.append({0: slots, 1: rank})
    return names, examples, dynamic


class _Graph(nn.Module):
    """A batch's arrays to pooled vectors and states; with `is_routed` every row takes the LoRA of its slot."""

    def __init__(self, backbone: Backbone, *, is_routed: bool = False) -> None:
        super().__init__()
        self.network = NETWORKS[backbone.info.modality]
        self.encoder = self.network.load(backbone.folder)
        self.pooler = Pooler.of(backbone)
        self.inputs = self.network.example(self.encoder, rows=_EXAMPLE_ROWS, positions=_EXAMPLE_LENGTH)
        self.routing = Routing()
        self.layout = route(self.encoder, self.routing, self.network) if is_routed else LoraLayout(())

    def forward(self, *more: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, stacks = dict(zip(self.inputs, more, strict=False)), more[len(self.inputs) :]
        if self.layout.groups:
            self._take(stacks[0], stacks[1:])
        states = self.network.states(self.encoder, inputs)
        self.routing.clear()
        return self.pooler(states, self.network.mask(inputs)), states

    def _take(self, slots: torch.Tensor, stacks: Sequence[torch.Tensor]) -> None:
        a, b, position = {}, {}, 0
        for number, group in enumerate(self.layout.groups):
            a[number] = stacks[position]
            for index in range(len(group.linears)):
                b[number, index] = stacks[position + 1 + index]
            position += 1 + len(group.linears)
        self.routing.rows = None
        self.routing.a = lambda group: a[group].index_select(0, slots)
        self.routing.b = lambda group, linear: b[group, linear].index_select(0, slots)
