"""What a measurement holds for: the processor or GPU, and the versions of the libraries that compute on it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

# Flags that decide which kernels a runtime picks.
KERNEL_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8")
_LIBRARIES = ("torch", "transformers", "onnxruntime", "onnxruntime-gpu", "tensorrt-cu13", "openvino", "numpy")


@dataclass(frozen=True, slots=True)
class DeviceFingerprint:
    """`key` is equal where measurements can be shared. Unknown parts are empty."""

    kind: str
    name: str
    cores: int
    flags: tuple[str, ...]
    memory_bytes: int
    compute_capability: str
    driver: str
    libraries: dict[str, str]

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def fingerprint(device: str) -> DeviceFingerprint:
    """Of `cpu` or `cuda[:index]`. Imports torch only for a GPU."""
    libraries = {name: version for name in _LIBRARIES if (version := _version(name))}
    if device.startswith("cuda"):
        return _of_gpu(device, libraries)
    name, flags = parse_cpuinfo(_read("/proc/cpuinfo"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return DeviceFingerprint("cpu", name or platform.processor(), cores, flags, 0, "", "", libraries)


def has_vnni(device: DeviceFingerprint) -> bool:
    """Whether products of 8-bit numbers are summed in 32 bits by the processor itself."""
    return not {"avx512_vnni", "avx_vnni", "amx_int8"}.isdisjoint(device.flags)


def parse_cpuinfo(text: str) -> tuple[str, tuple[str, ...]]:
    """Model name and kernel flags from Linux's `/proc/cpuinfo` (x86 `flags`; elsewhere there are none)."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, separator, value = line.partition(":")
        if separator:
            fields.setdefault(key.strip(), value.strip())
    present = set(fields.get("flags", "").split())
    return fields.get("model name", ""), tuple(flag for flag in KERNEL_FLAGS if flag in present)


def _of_gpu(device: str, libraries: dict[str, str]) -> DeviceFingerprint:
    import torch

    properties = torch.cuda.get_device_properties(device)
    capability = f"{properties.major}.{properties.minor}"
    driver = _read("/proc/driver/nvidia/version").splitlines()[:1]
    return DeviceFingerprint(
        "cuda",
        properties.name,
        properties.multi_processor_count,
        (),
        int(properties.total_memory),
        capability,
        (driver[0] if driver else "")[:200],
        libraries | {"cuda": str(torch.version.cuda)},
    )


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""
