"""Running chains as Ray tasks. The only module that imports Ray.

A task gets a folder, numbers and one shard's derived keys; rows never pass through Ray, so that none can
stay in its object store, spill files or logs. A chain is idempotent: when a worker dies its chain is
submitted again and finds its finished stages. Events come back through a streaming generator.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import queue
import secrets
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sisa.errors import SisaError, StoreError, UserError
from sisa.execution.folder import working_folder
from sisa.execution.interrupts import interrupts_deferred
from sisa.execution.machines import require_place, room
from sisa.execution.meters import Meters
from sisa.execution.options import refuse_client
from sisa.execution.receiver import Receiver
from sisa.planning.placement import Need
from sisa.training.chain import ChainTask, run_chain
from sisa.training.events import Event, Kept, StageDone, Trained

TRIES = 4
"""How often the workers of a chain may die without a stage or a snapshot between, before that is reported."""
ENTER_EVERY_S = 0.1
"""Stages that are reported within so long are entered in one transaction: each waits for the disk several times. A
driver that dies in between loses no stage: they lie in the checkpoints, and are found and verified."""
LOOK_EVERY_S = 5.0
"""How often the driver sees what machines there are."""
PLACELESS_S = 600.0
"""How long a cluster may have no machine that can hold a worker, once it had one: spot machines come back."""
EVENT_INTERVAL_S = 0.3
"""Progress is sent no more often than this."""


def run_on_ray(
    tasks: Sequence[ChainTask], receiver: Receiver, *, address: str | None, need: Need, limit: int | None
) -> None:
    """Run the chains on a Ray cluster, in the order given.

    Args:
        tasks: The chains.
        receiver: Who is told how they go on.
        address: A running cluster; None starts one on this machine.
        need: What each worker takes of its machine.
        limit: How many chains run at a time at most; None for as many as the cluster holds.

    Raises:
        UserError: There is no cluster at ``address``, or no machine of it can ever hold a worker.
    """
    with connected(address, cores=math.ceil((limit or 1) * need.cpus)) as ray:
        require_place(ray, need)
        remote = ray.remote(
            num_cpus=need.cpus,
            num_gpus=need.gpus,
            memory=need.memory_bytes or None,
            max_retries=0,
            num_returns="streaming",
        )(_chain_events)
        chains = _Chains(ray, remote, tasks, receiver, need=need, limit=limit)
        try:
            chains.run()
        finally:
            chains.cancel()


@dataclass
class _Chain:
    """A chain and how often its workers died since it last got further."""

    task: ChainTask
    deaths: int = 0


class _Chains:
    """The driver's loop: starts chains, takes what they report, and starts those again whose workers died."""

    def __init__(
        self, ray: Any, remote: Any, tasks: Sequence[ChainTask], receiver: Receiver, *, need: Need, limit: int | None
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
        self._paths = _import_paths()
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
        item = _item(self._ray, stream)
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


def _item(ray: Any, stream: Any) -> list[Event] | SisaError | str:
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


def running_cluster() -> str:
    """Return the address (host:port) that "auto" stands for here.

    Raises:
        UserError: No cluster runs on this machine, and RAY_ADDRESS names none.
    """
    from ray._private.services import get_ray_address_from_environment

    try:
        return str(get_ray_address_from_environment("auto", None))
    except ConnectionError as error:
        raise UserError(
            "--address 'auto': no Ray cluster runs on this machine",
            hint="Start one, give its address, or leave it out to run on this machine.",
        ) from error


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


def _chain_events(task: ChainTask, import_paths: list[str]) -> Iterator[list[Event] | SisaError]:
    """Run a chain on a thread of the worker and hand out its events as they come."""
    sys.path.extend(path for path in import_paths if path not in sys.path)
    events: queue.SimpleQueue[Event | SisaError | BaseException | None] = queue.SimpleQueue()

    def work() -> None:
        try:
            run_chain(task, events.put)
        except BaseException as error:  # noqa: BLE001 - handed over to the main thread, which raises it
            events.put(error)
        events.put(None)

    threading.Thread(target=work, daemon=True).start()
    pending: list[Event] = []
    trained, last = 0, time.monotonic()
    while (event := events.get()) is not None:
        if isinstance(event, SisaError):
            yield event
        elif isinstance(event, BaseException):
            raise event
        elif isinstance(event, Trained):
            trained += event.record_epochs
        else:
            pending.append(event)
        if pending or time.monotonic() - last > EVENT_INTERVAL_S:
            yield [Trained(task.shard, trained), *pending]
            pending, trained, last = [], 0, time.monotonic()
    yield [Trained(task.shard, trained)]


def _import_paths() -> list[str]:
    """Where the driver finds a user's model factory, so that workers on this machine find it too."""
    return [path or os.getcwd() for path in sys.path]  # noqa: PTH109 - text is what sys.path holds


@contextlib.contextmanager
def connected(address: str | None, *, cores: int) -> Iterator[Any]:
    """Yield Ray, connected; a cluster that we started is stopped and its files are removed.

    Raises:
        UserError: There is no cluster at ``address``, or none of a kind that can be used, or none can be started.
    """
    if address is None:
        # A local cluster listens on the machine's interfaces: let nobody in without this session's token.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        if os.environ["RAY_AUTH_MODE"] == "token" and not any(
            name in os.environ for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
        ):
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if ray.is_initialized():
        yield ray
        return
    _read_variables_again()
    with contextlib.nullcontext() if address is not None else working_folder() as folder, _unheard(ray):
        try:
            with interrupts_deferred():
                _connect(ray, address, cores=cores, folder=folder)
            yield ray
        finally:
            with interrupts_deferred():
                ray.shutdown()


@contextlib.contextmanager
def _unheard(ray: Any) -> Iterator[None]:
    """Keep what Ray says of dead workers off stdout, where it would land among answers; we say it on stderr."""
    module = ray._private.worker
    before = module._worker_logs_enabled
    module._worker_logs_enabled = False
    try:
        yield
    finally:
        module._worker_logs_enabled = before


def _read_variables_again() -> None:
    """Have Ray look at the variables that were set just now: it did so at its import, which may have been our caller's."""
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]  # compiled

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def _connect(ray: Any, address: str | None, *, cores: int, folder: Path | None) -> None:
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": False}
    if address is None:
        # "local" is said aloud: without it RAY_ADDRESS, or a cluster that runs here, would be joined instead.
        options |= {"address": "local", "num_cpus": cores, "include_dashboard": False, "_temp_dir": str(folder)}
        options |= {"object_store_memory": 128 * 2**20}
    else:
        refuse_client(address)
        options["address"] = address
    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        where = f"at {address!r} " if address else ""
        raise UserError(
            f"--address: no Ray cluster {where}could be reached or started ({type(error).__name__})",
            hint="Check the address, or leave it out to run on this machine.",
        ) from error
