"""Running chains as Ray tasks. Ray is imported and connected here.

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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sisa.errors import SisaError, UserError
from sisa.execution.driver import Chains
from sisa.execution.folder import working_folder
from sisa.execution.interrupts import interrupts_deferred
from sisa.execution.machines import require_place
from sisa.execution.options import refuse_client
from sisa.execution.receiver import Receiver
from sisa.planning.placement import Need
from sisa.training.chain import ChainTask, run_chain
from sisa.training.events import Event, Trained

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
        chains = Chains(ray, remote, tasks, receiver, need=need, limit=limit, paths=_import_paths())
        try:
            chains.run()
        finally:
            chains.cancel()


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
