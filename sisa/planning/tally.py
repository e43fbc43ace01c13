"""How far a build is, told by what its chains report. Pure.

A chain may begin again elsewhere, from its last stage or from a snapshot within one, and stages that were made already
are reported once more: neither may count twice. So what is done is counted by place, not by message.
"""

from __future__ import annotations

from collections.abc import Mapping


class Tally:
    """The work of the planned stages, in record-epochs; each method returns by how much more is done than before."""

    def __init__(self, costs: Mapping[int, Mapping[int, int]]) -> None:
        """Start from nothing done.

        Args:
            costs: By shard and stage, the record-epochs of each stage that has to be made; the last ones of a chain.
        """
        self._costs = costs
        self._reached = {shard: min(stages, default=1) - 1 for shard, stages in costs.items()}
        self._within = dict.fromkeys(costs, 0)
        self.total = sum(sum(stages.values()) for stages in costs.values())
        self.stages = sum(len(stages) for stages in costs.values())
        self.stages_done = 0

    def trained(self, shard: int, amount: int) -> int:
        """Count work within the stage that the shard's chain is at."""
        return self._set_within(shard, self._within[shard] + amount)

    def resumed(self, shard: int, amount: int) -> int:
        """Count the work that lies behind the snapshot from which a stage goes on."""
        return self._set_within(shard, amount)

    def restarted(self, shard: int) -> int:
        """Take back what was done of a stage and is lost."""
        return self._set_within(shard, 0)

    def finished(self, shard: int, stage: int) -> int:
        """Count a stage that lies on disk; one that was counted before is nothing new."""
        if stage <= self._reached[shard]:
            return 0
        more = self._cost(shard) - self._within[shard]
        self._within[shard] = 0
        self._reached[shard] = stage
        self.stages_done += 1
        return more

    def _set_within(self, shard: int, amount: int) -> int:
        before = self._within[shard]
        self._within[shard] = min(amount, self._cost(shard))
        return self._within[shard] - before

    def _cost(self, shard: int) -> int:
        return self._costs[shard].get(self._reached[shard] + 1, 0)
