"""What a result's bits depend on besides its inputs: libraries, instruction set, device, threads, flags.

Two processes with equal fingerprints give equal bits; with different ones they may not, so stages are kept apart by
platform and workers that differ are refused.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import platform
import sys
from pathlib import Path
from typing import cast

import torch

from sisa.learners.flags import device_of, training_flags
from sisa.learners.models import wants_channels_last
from sisa.learners.optimizers import implementation
from sisa.lineage import SEMANTICS
from sisa.recipe import Recipe
from sisa.state import JSON
from sisa.training.group import backend
from sisa.training.steering import steering

__all__ = ["fingerprint", "platform_id", "training_flags"]

INSTRUCTION_SETS = ("sse4", "avx", "fma", "amx", "bmi", "f16c", "asimd", "sve")
"""Prefixes of the processor's flags by which numeric libraries choose their kernels."""


def fingerprint(recipe: Recipe) -> dict[str, JSON]:
    """Return everything that the bits of a training with ``recipe`` depend on, besides its inputs.

    Raises:
        UserError: The recipe asks for a GPU and there is none.
    """
    device = device_of(recipe)
    return {
        **_process(),
        "sisa_semantics": SEMANTICS,
        "device": device.type,
        **({"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda} if device.type == "cuda" else {}),
        "threads": recipe.training.threads,
        "flags": ["deterministic", "float32", "highest precision", "no flushed denormals", "eager"],
        "optimizer": implementation(recipe),
        "memory_format": "channels_last" if wants_channels_last(recipe) else "contiguous",
        "environment": steering(device.type),
        **_together(recipe),
    }


def _together(recipe: Recipe) -> dict[str, JSON]:
    """Say how many processes train a shard, if it is more than one."""
    count = recipe.workers.devices_per_shard
    return {"processes": count, "exchange": backend(recipe.training.device)} if count > 1 else {}


def platform_id(fingerprint: dict[str, JSON]) -> str:
    """Return the 12 hex digits by which stages of one platform are told from those of another."""
    text = json.dumps(fingerprint, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _process() -> dict[str, JSON]:
    return {
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "torch": str(torch.__version__),
        "numpy": importlib.metadata.version("numpy"),
        "pyarrow": importlib.metadata.version("pyarrow"),
        "machine": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "processor": list(_processor()),
        "mkldnn": bool(torch._C._has_mkldnn and torch._C._get_mkldnn_enabled()),
    }


@functools.cache
def _processor() -> tuple[str, ...]:
    """Return the maker and the instruction sets of this processor, in order."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return (platform.processor(),)
    fields = dict(
        cast("tuple[str, str]", tuple(map(str.strip, line.split(":", 1))))
        for line in text.partition("\n\n")[0].splitlines()
        if ":" in line
    )
    maker = fields.get("vendor_id") or fields.get("CPU implementer") or platform.processor()
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    return (maker, *sorted(flag for flag in flags if flag.startswith(INSTRUCTION_SETS)))
