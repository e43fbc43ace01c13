"""Describe the machine that a benchmark ran on: figures without it can't be compared with anything."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

PACKAGES = ("torch", "numpy", "pyarrow", "zarr", "ray")


def describe() -> dict[str, str | int | float]:
    """Return processor, cores, memory and versions, as plain data for JSON."""
    described: dict[str, str | int | float] = {
        "cpu": _first("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }
    for name in PACKAGES:
        try:
            described[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            described[name] = "absent"
    return described


def one_line() -> str:
    """Return the description as one line of text."""
    return ", ".join(f"{name} {value}" for name, value in describe().items())


def _first(path: str, field: str) -> str:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")
