"""What one worker gets of a machine, and how often it puts by what it has done.

No bit of a stage depends on it, except on ``devices_per_shard``: several devices add up in another order than one.

How many *threads* torch uses does, and is a field of ``training``: a worker that is promised four processors and
trains with one thread computes the same as any other.
"""

from __future__ import annotations

import re
from typing import Final, Literal

from pydantic import Field, field_validator

from sisa.recipe.section import Section, whole_or_broken

MOST_DEVICES: Final = 64
UNITS: Final = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([A-Za-z]*)")


class WorkersSpec(Section):
    """Resources of one worker; more of them make nothing faster than ``training.threads`` allows."""

    cpus: float | None = Field(default=None, gt=0.0)
    """Processors, or a fraction of one; by default ``training.threads`` for each device."""
    gpus: float | None = Field(default=None, ge=0.0)
    """GPUs, or a fraction of one; by default one for each device with ``training.device: cuda``, else 0."""
    memory: int | str | None = None
    """Bytes, or text such as ``4GiB``. Ray places workers by it and doesn't enforce it."""
    rows_in_memory: Literal["auto", "always", "never"] = "auto"
    """Whether a stage's preprocessed rows are held in memory: ``never`` streams them from disk in the order of each
    epoch, with the same bits; ``auto`` does so where they would take more than half of ``memory``, or without that of
    what the machine has left."""
    snapshot_every_s: float | None = Field(default=300.0, ge=0.0)
    """Seconds of training between two recovery snapshots of a stage; null: none. Not kept yet with several devices."""
    devices_per_shard: int = Field(default=1, ge=1, le=MOST_DEVICES)
    """Processes that train one shard together, each on a device of its own and on its part of every batch. Another
    number gives other bits, so more than one belongs to the recipe's identity."""

    @field_validator("cpus", "gpus", "snapshot_every_s", mode="before")
    @classmethod
    def _whole_numbers_too(cls, value: object) -> object:
        return whole_or_broken(value)

    @field_validator("gpus")
    @classmethod
    def _no_broken_several(cls, value: float | None) -> float | None:
        if value is not None and value > 1 and value != int(value):
            raise ValueError(f"expected a whole number, or a fraction of one GPU; got {value:g}")
        return value

    @field_validator("memory")
    @classmethod
    def _readable(cls, value: int | str | None) -> int | str | None:
        if value is not None and size_bytes(value) < 1:
            raise ValueError("expected at least one byte")
        return value

    @property
    def memory_bytes(self) -> int | None:
        """``memory`` as a number."""
        return None if self.memory is None else size_bytes(self.memory)


def size_bytes(size: int | str) -> int:
    """Return a size in bytes.

    >>> size_bytes("4GiB"), size_bytes("1.5 MB"), size_bytes(512)
    (4294967296, 1500000, 512)

    Raises:
        ValueError: It is no size.
    """
    match = _SIZE.fullmatch(str(size))
    if match is None or match[2].upper() not in UNITS:
        raise ValueError(f"expected bytes, or a size such as 4GiB or 500MB; got {size!r}")
    return int(float(match[1]) * UNITS[match[2].upper()]) if match[2] or "." in match[1] else int(match[1])
