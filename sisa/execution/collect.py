"""The driver's side of a build: what chains report becomes lines of the ledger, progress, and a result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sisa.errors import DamagedError, SisaError, StaleError
from sisa.ledger import Partition, StageRow
from sisa.opening import OpenStore
from sisa.planning.tally import Tally
from sisa.progress import Reporter
from sisa.training.events import Event, Resumed, Said, StageDone, Trained
from sisa.training.stage import Stopped


@dataclass
class Build:
    """What a build did."""

    trained: list[StageRow] = field(default_factory=list)
    reused: list[StageRow] = field(default_factory=list)
    interrupted: set[int] = field(default_factory=set)
    """Shards that a deletion overtook."""
    failures: dict[int, SisaError] = field(default_factory=dict)
    used_ray: bool = False


class Collector:
    """Takes what chains report; a :class:`sisa.execution.receiver.Receiver`."""

    def __init__(
        self,
        store: OpenStore,
        done: Build,
        tally: Tally,
        reporter: Reporter,
        *,
        partitions: Mapping[int, Sequence[Partition]],
        enter: bool,
    ) -> None:
        self._store = store
        self._done = done
        self._tally = tally
        self._reporter = reporter
        self._enter = enter
        self._changes = {shard: {p.slice: p.changes for p in slices} for shard, slices in partitions.items()}

    def events(self, events: Sequence[Event]) -> None:
        """Enter the stages among them, in one transaction, and pass progress on."""
        for event in events:
            if isinstance(event, Trained):
                self._reporter.advance(self._tally.trained(event.shard, event.record_epochs))
            elif isinstance(event, Resumed):
                self._reporter.found(self._tally.resumed(event.shard, event.record_epochs))
            elif isinstance(event, Said):
                self._reporter.note(event.text)
        stages = [event for event in events if isinstance(event, StageDone)]
        if stages:
            self._stages(stages)

    def failure(self, shard: int, error: SisaError) -> None:
        """Sort what ended a chain: a deletion that overtook it, or a fault."""
        slices = self._store.slices
        overtaken = self._store.ledger.stages.overtaken(shard, slices, changes=self._changes[shard])
        if isinstance(error, Stopped) or overtaken:
            self._done.interrupted.add(shard)
        elif isinstance(error, StaleError):
            self._done.failures[shard] = DamagedError(error.message, hint=error.hint)
        else:
            self._done.failures[shard] = error

    def restarted(self, shard: int) -> None:
        """Say that a chain begins again, and take back what is lost of it."""
        self._reporter.found(self._tally.restarted(shard))
        self._reporter.note(f"the worker that trained shard {shard} is gone; its chain goes on elsewhere")

    def note(self, text: str) -> None:
        """Pass a line on."""
        self._reporter.note(text)

    def _stages(self, events: Sequence[StageDone]) -> None:
        rows = [event.row for event in events]
        usable = [True] * len(rows)
        if self._enter:
            usable = self._store.ledger.stages.enter_all([(row, self._changes[row.shard]) for row in rows])
        for event, usable_now in zip(events, usable, strict=True):
            row = event.row
            if not usable_now:
                self._done.interrupted.add(row.shard)
                continue
            (self._done.reused if event.reused else self._done.trained).append(row)
            more = self._tally.finished(row.shard, row.stage)
            self._reporter.found(more) if event.reused else self._reporter.advance(more)
        self._reporter.stages(self._tally.stages_done, self._tally.stages)
