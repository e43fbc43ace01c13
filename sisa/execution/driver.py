"""The driver's loop over chains that run as Ray tasks.

It starts them, takes what they report, and starts those again whose workers or machines are lost. Ray itself comes in as
an argument, connected.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sisa.errors import SisaError, StoreError, UserError
from sisa.execution.machines import room
from sisa.execution.meters import Meters
from sisa.execution.receiver import Receiver
from sisa.planning.placement import Need
from sisa.training.chain import ChainTask
from sisa.training.events import Event, Kept, StageDone

TRIES = 4
"""How often the workers of a chain may die without a stage or a snapshot between, before that is reported."""
ENTER_EVERY_S = 0.1
"""Stages that are reported within so long are entered in one transaction: each waits for the disk several times. A
driver that dies in between loses no stage: they lie in the checkpoints, and are found and verified."""
LOOK_EVERY_S = 5.0
"""How often the driver sees what machines there are."""
PLACELESS_S = 600.0
"""How long a cluster may have no machine that can hold a worker, once it had one: spot machines come back."""


@dataclass
class _Chain:
    """A chain and how often its workers died since it last got further."""

    task: ChainTask
    deaths: int = 0


class Chains:
    """The driver's loop: starts chains, takes what they report, and starts those again whose workers died."""

    def __init__(
        self,
        ray: Any,
        remote: Any,
        tasks: Sequence[ChainTask],
        receiver: Receiver,
        *,
        need: Need,
        limit: int | None,
        paths: list[str],
    ) -> None:
        self._ray = ray
        self._remote = remote
        self._receiver = receiver
        self._need = need
        self._limit = limit
        self._waiting = deque(_Chain(task) for task in tasks)
        self._running: dict[Any, _Chain] = {}
        self._pending: list[Event] = []
        self._flushed = -math.inf
        self._paths = paths
        self._meters = Meters(shards=tasks[0].recipe.sisa.shards if tasks else 0)
        self._room = limit or 1
        self._looked = -math.inf
        self._placeless_since: float | None = None

    def run(self) -> None:
        """Run until every chain has ended.

        Raises:
            UserError: Workers can't take up their chains.
        """
        while self._waiting or self._running:
            self._look()
            while self._waiting and len(self._running) < self._room:
                self._start()
            for stream in self._ready():
                chain = self._running[stream]
                state = self._take(stream, chain)
                if state != "running":
                    del self._running[stream]
                if state == "died":
                    self._again(chain)
            if time.monotonic() - self._flushed >= ENTER_EVERY_S:
                self._flush()
        self._flush()

    def cancel(self) -> None:
        """Give up what still runs."""
        for stream in self._running:
            with contextlib.suppress(Exception):
                self._ray.cancel(stream, force=True)

    def _start(self) -> None:
        chain = self._waiting.popleft()
        self._running[self._remote.remote(chain.task, self._paths)] = chain

    def _ready(self) -> list[Any]:
        """Wait for a report, and return all chains that have one by then: what comes together is entered together."""
        streams = list(self._running)
        ready, others = self._ray.wait(streams, num_returns=1, timeout=ENTER_EVERY_S if self._pending else 1.0)
        if ready and others:
            ready, _ = self._ray.wait(streams, num_returns=len(streams), timeout=0)
        return list(ready)

    def _take(self, stream: Any, chain: _Chain) -> str:
        """Take one item from a chain's stream; say whether the chain is running, ended or died."""
        item = taken(self._ray, stream)
        if isinstance(item, str):
            return item
        if isinstance(item, SisaError):
            self._flush()
            self._receiver.failure(chain.task.shard, item)
        else:
            if any(isinstance(event, Kept) or (isinstance(event, StageDone) and not event.reused) for event in item):
                chain.deaths = 0
            self._pending += item
        return "running"

    def _flush(self) -> None:
        events, self._pending = self._pending, []
        if events:
            self._receiver.events(events)
            self._meters.count(events)
        self._flushed = time.monotonic()

    def _again(self, chain: _Chain) -> None:
        """Start a chain again whose worker died, before all others: it has waited longest."""
        self._flush()
        chain.deaths += 1
        if chain.deaths == TRIES:
            self._receiver.failure(chain.task.shard, _died(chain.task))
            return
        self._receiver.restarted(chain.task.shard)
        self._waiting.appendleft(chain)

    def _look(self) -> None:
        """See now and then how many workers the cluster holds: machines come and go."""
        now = time.monotonic()
        if now - self._looked < LOOK_EVERY_S:
            return
        self._looked = now
        found = room(self._ray, self._need)
        self._room = self._limit or max(1, found)
        if found:
            self._placeless_since = None
        elif self._placeless_since is None:
            self._placeless_since = now
            self._receiver.note(f"no machine of the cluster can hold a worker any more ({self._need}): waiting for one")
        elif now - self._placeless_since > PLACELESS_S:
            self._give_up()

    def _give_up(self) -> None:
        """End every chain: the machines that could run them have been gone for too long."""
        self.cancel()
        for chain in [*self._running.values(), *self._waiting]:
            self._receiver.failure(chain.task.shard, _placeless(self._need))
        self._running.clear()
        self._waiting.clear()


def taken(ray: Any, stream: Any) -> list[Event] | SisaError | str:
    """Return what a chain says next; or, as a word, that it ended or died.

    Raises:
        UserError: Workers can't take up their chains.
    """
    try:
        found: list[Event] | SisaError = ray.get(next(stream))
    except StopIteration:
        return "ended"
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError, ray.exceptions.ObjectLostError,
            ray.exceptions.OutOfMemoryError, ray.exceptions.TaskUnschedulableError):  # fmt: skip
        return "died"
    except ray.exceptions.RaySystemError as error:
        raise UserError(
            f"--address: a worker of the cluster can't take up its chain: {_first_cause(error)}",
            hint="Its workers need this package in the same version, with the libraries that it needs.",
        ) from error
    return found


def _first_cause(error: BaseException) -> str:
    """Return what went wrong in the worker: the last line that says something."""
    return [line.strip() for line in str(error).splitlines() if line.strip()][-1]


def _died(task: ChainTask) -> StoreError:
    return StoreError(
        f"the workers that trained shard {task.shard} died {TRIES} times without getting further",
        hint="They may run out of memory: look at Ray's logs, or use fewer --workers. What was trained is kept.",
    )


def _placeless(need: Need) -> StoreError:
    return StoreError(
        f"no machine of the Ray cluster could hold a worker ({need}) for {PLACELESS_S:.0f} s: they are gone",
        hint="Add machines, then run the command again: what was trained is kept.",
    )
