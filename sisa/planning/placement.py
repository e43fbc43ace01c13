"""Which chain goes first, and what a cluster's machines can hold. Pure.

Chains of one training differ in length: shards by hash are not balanced, and after a crash or a deletion some have more
left than others. Starting the longest first keeps a long one from ending alone (Graham 1969: within 4/3 of the best).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

SLACK = 1e-6
"""Fractions of a processor are counted in ten-thousandths: sums of them are compared with room for rounding."""


@dataclass(frozen=True, kw_only=True)
class Need:
    """What one worker takes of one machine."""

    cpus: float
    gpus: float = 0.0
    memory_bytes: int = 0

    def as_resources(self) -> dict[str, float]:
        """Return what isn't zero, by the names under which machines offer it."""
        found = {"CPU": self.cpus, "GPU": self.gpus, "memory": float(self.memory_bytes)}
        return {name: amount for name, amount in found.items() if amount}

    def __str__(self) -> str:
        parts = [f"{self.cpus:g} CPUs", *([f"{self.gpus:g} GPUs"] if self.gpus else [])]
        return ", ".join([*parts, *([f"{self.memory_bytes / 2**30:.3g} GiB of memory"] if self.memory_bytes else [])])


def longest_first(work: Mapping[int, int]) -> list[int]:
    """Return the shards in the order in which their chains start: most record-epochs left first, then by number.

    >>> longest_first({0: 5, 1: 9, 2: 5})
    [1, 0, 2]
    """
    return sorted(work, key=lambda shard: (-work[shard], shard))


def places(machine: Mapping[str, float], need: Need) -> int:
    """Return how many workers one machine can hold at a time.

    >>> places({"CPU": 8.0, "memory": 4.0 * 2**30}, Need(cpus=0.5, memory_bytes=2**30))
    4
    """
    return min(int(machine.get(name, 0.0) / amount + SLACK) for name, amount in need.as_resources().items())


def capacity(machines: Iterable[Mapping[str, float]], need: Need) -> int:
    """Return how many workers all machines together can hold at a time."""
    return sum(places(machine, need) for machine in machines)
