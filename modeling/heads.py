"""Task heads: small dense stacks on the pooled vector, applied outside the backbone's graph.

One form covers our own linear heads and those of published checkpoints (BERT's tanh pooler before
its classifier, RoBERTa's two layers, …), so any number of heads share one backbone batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from modeling import weights
from modeling.errors import WeightsInvalid
from modeling.weights import FloatArray

Activation = Literal["linear", "tanh", "relu", "gelu"]
_ACTIVATIONS: tuple[Activation, ...] = ("linear", "tanh", "relu", "gelu")


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """Each row at mean 0 and variance 1, times `weight` plus `bias`, both float32[width] (Ba et al., 2016)."""

    weight: FloatArray
    bias: FloatArray
    eps: float

    def __call__(self, x: FloatArray) -> FloatArray:
        centred = x - x.mean(axis=-1, keepdims=True)
        deviation = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + np.float32(self.eps))
        result: FloatArray = centred / deviation * self.weight + self.bias
        return result


@dataclass(frozen=True, slots=True)
class DenseLayer:
    """`norm(activation(x @ weight.T + bias))`; weight is float32[out, in], bias float32[out]."""

    weight: FloatArray
    bias: FloatArray
    activation: Activation = "linear"
    norm: LayerNorm | None = None

    def __call__(self, x: FloatArray) -> FloatArray:
        y = _activate(x @ self.weight.T + self.bias, self.activation)
        return y if self.norm is None else self.norm(y)


@dataclass(frozen=True, slots=True)
class TaskHead:
    """Layers from the pooled vector float32[rows, hidden] to logits float32[rows, outputs]; `modeling.tasks` says what
    they mean.

    With `normalize` the pooled vector is first scaled to length 1, as sentence encoders publish it.
    `temperature` divides the logits before the softmax (Guo et al., 2017); it never changes the answer.
    """

    layers: tuple[DenseLayer, ...]
    normalize: bool = False
    temperature: float = 1.0

    @property
    def input_size(self) -> int:
        return int(self.layers[0].weight.shape[1])

    @property
    def labels(self) -> int:
        return int(self.layers[-1].weight.shape[0])

    @property
    def size_bytes(self) -> int:
        return sum(layer.weight.nbytes + layer.bias.nbytes for layer in self.layers)

    def logits(self, pooled: FloatArray) -> FloatArray:
        x = normalized(pooled) if self.normalize else pooled
        for layer in self.layers:
            x = layer(x)
        return x

    def probabilities(self, logits: FloatArray) -> FloatArray:
        return softmax(logits / np.float32(self.temperature))

    def to_bytes(self) -> bytes:
        tensors = {}
        metadata = {"activations": ",".join(layer.activation for layer in self.layers)}
        metadata["normalize"] = str(self.normalize).lower()
        for index, layer in enumerate(self.layers):
            tensors[f"{index}.weight"], tensors[f"{index}.bias"] = layer.weight, layer.bias
            if layer.norm is not None:
                tensors[f"{index}.norm.weight"], tensors[f"{index}.norm.bias"] = layer.norm.weight, layer.norm.bias
                metadata[f"{index}.norm.eps"] = repr(layer.norm.eps)
        return weights.to_bytes(tensors, metadata)

    @classmethod
    def read(cls, path: Path, *, temperature: float = 1.0) -> TaskHead:
        """Raises `WeightsInvalid` where the file is not a head whose layers fit each other."""
        tensors, metadata = weights.read(path)
        activations = metadata.get("activations", "").split(",")
        layers: list[DenseLayer] = []
        for index, activation in enumerate(activations):
            weight, bias = tensors.pop(f"{index}.weight", None), tensors.pop(f"{index}.bias", None)
            if weight is None or bias is None or activation not in _ACTIVATIONS:
                raise WeightsInvalid(f"{path.name}: layer {index} is missing or its activation is unknown")
            if weight.ndim != 2 or bias.shape != weight.shape[:1]:
                raise WeightsInvalid(f"{path.name}: layer {index} has shapes {weight.shape} and {bias.shape}")
            if layers and layers[-1].weight.shape[0] != weight.shape[1]:
                raise WeightsInvalid(f"{path.name}: layer {index} does not fit the layer before it")
            layers.append(DenseLayer(weight, bias, activation, _read_norm(tensors, metadata, index, bias.shape)))
        if tensors:
            raise WeightsInvalid(f"{path.name} holds tensors that no layer uses: {', '.join(sorted(tensors))[:200]}")
        return cls(tuple(layers), normalize=metadata.get("normalize") == "true", temperature=temperature)


def _read_norm(
    tensors: dict[str, FloatArray], metadata: dict[str, str], index: int, shape: tuple[int, ...]
) -> LayerNorm | None:
    """What is behind a layer, taken out of `tensors`. Raises `WeightsInvalid`."""
    weight, bias = tensors.pop(f"{index}.norm.weight", None), tensors.pop(f"{index}.norm.bias", None)
    if weight is None and bias is None:
        return None
    try:
        eps = float(metadata[f"{index}.norm.eps"])
    except (KeyError, ValueError) as error:
        raise WeightsInvalid(f"the norm of layer {index} has no eps") from error
    if weight is None or bias is None or weight.shape != shape or bias.shape != shape or not 0 < eps < 1:
        raise WeightsInvalid(f"the norm of layer {index} does not fit it")
    return LayerNorm(weight, bias, eps)


def normalized(vectors: FloatArray) -> FloatArray:
    """Each row scaled to Euclidean length 1; a zero row stays zero."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    scaled: FloatArray = vectors / np.maximum(lengths, np.float32(1e-12))
    return scaled


def softmax(logits: FloatArray) -> FloatArray:
    """Along the last axis, stable for large logits."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    result: FloatArray = shifted / shifted.sum(axis=-1, keepdims=True)
    return result


def sigmoid(logits: FloatArray) -> FloatArray:
    """Of each logit by itself; the exponential is only taken of what is not positive, so none is too large."""
    small = np.exp(-np.abs(logits))
    result: FloatArray = np.where(logits >= 0, np.ones_like(small), small) / (1 + small)
    return result


def _activate(x: FloatArray, activation: Activation) -> FloatArray:
    if activation == "tanh":
        return np.tanh(x)
    if activation == "relu":
        return np.maximum(x, np.float32(0))
    if activation == "gelu":
        return _gelu(x)
    return x


def _gelu(x: FloatArray) -> FloatArray:
    from scipy.special import erf

    result: FloatArray = (0.5 * x * (1.0 + erf(x / np.sqrt(2.0)))).astype(np.float32)
    return result
