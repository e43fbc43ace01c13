"""The same application in several processes, behind the HTTP proxy of Ray Serve.

Each process has a replica of its own, with its own lease: the ledger is where they meet, and a deletion waits for all
of them. They run on the machine that the store is on, since a ledger must not be opened over a network. Repairs run in
the process that started them, which looks for open deletions: whichever replica accepted one, nobody else repairs it.

Rows go from the proxy to a replica over gRPC, never through Ray's object store, which may spill to disk.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sisa.errors import StoreError, UserError
from sisa.execution.options import Execution
from sisa.serving.app import Serving, create_app
from sisa.serving.repairer import Repairer
from sisa.serving.server import check_tls

if TYPE_CHECKING:
    from fastapi import FastAPI

NAME = "sisa"
LOOK_EVERY_S = 1.0
"""How often open deletions are looked for."""
ONGOING = 100
"""How many requests a replica works on at a time."""
SHUTDOWN_S = 10
POLL_S = 0.1
TELL_AFTER_S = 15.0
SETTINGS = {
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
}
"""What Ray Serve reads from the environment, here and in its processes.

Not ``RAY_SERVE_ENABLE_HA_PROXY``, though it is faster: HAProxy speaks no TLS as Ray sets it up, shows its statistics to
the whole network, and takes orders from every user of the machine. Who wants it can set it."""


def run(
    serving: Serving,
    *,
    replicas: int,
    host: str,
    port: int,
    tls: tuple[str, str] | None = None,
) -> None:
    """Serve until the process is told to stop (SIGINT, SIGTERM).

    Args:
        serving: How the store is served. Its address is a running Ray cluster that this machine belongs to; without
            one a cluster is started here and stopped.
        replicas: How many processes answer.
        host: Where the proxy listens.
        port: Its port; 0 takes a free one.
        tls: Certificate and key, PEM files.

    Raises:
        UserError: There is no store, no such cluster, no Ray Serve, or the address can't be listened on.
        StoreError: The store is damaged, or the replicas don't start.
    """
    # What is wrong is said before anything is started.
    create_app(serving)
    check_tls(tls)
    Execution(address=serving.address).check()
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    _ray_serve()
    port = _free_port(host, port)
    stopping = threading.Event()
    with _cluster(serving.address, cores=replicas + 1), _signals(stopping):
        serve = _ray_serve()
        _check_cluster(replicas)
        repairer = Repairer(
            serving.layout, executor=serving.executor, address=serving.address, look_every_s=LOOK_EVERY_S
        )
        try:
            _deploy(serve, serving, replicas=replicas, host=host, port=port, tls=tls)
            if not _came_up(serve, stopping):
                return
            shown = f"[{host}]" if ":" in host else host
            sys.stderr.write(f"serving {'https' if tls else 'http'}://{shown}:{port}\n")
            sys.stderr.flush()
            if serving.repairs:
                repairer.start()
            stopping.wait()
        finally:
            repairer.stop()
            serve.shutdown()


def _deploy(serve: Any, serving: Serving, *, replicas: int, host: str, port: int, tls: tuple[str, str] | None) -> None:
    import ray
    from ray.serve.config import HTTPOptions
    from ray.serve.schema import LoggingConfig

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    logs = LoggingConfig(enable_access_log=False, log_level="WARNING")
    options = HTTPOptions(
        host=host, port=port, ssl_certfile=tls[0] if tls else None, ssl_keyfile=tls[1] if tls else None
    )
    serve.start(http_options=options, logging_config=logs)
    address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    deployment = serve.deployment(
        serve.ingress(_builder(serving))(),
        name=NAME,
        num_replicas=replicas,
        max_ongoing_requests=ONGOING,
        graceful_shutdown_timeout_s=SHUTDOWN_S,
        ray_actor_options={"num_cpus": 1, "resources": {f"node:{address}": 0.001}},
        logging_config=logs,
    )
    target = serve.RunTarget(target=deployment.bind(), name=NAME, route_prefix="/", logging_config=logs)
    serve.run_many([target], wait_for_applications_running=False)


def _came_up(serve: Any, stopping: threading.Event) -> bool:
    """Wait until every replica answers; say so if that takes long. False if we were told to stop meanwhile.

    Raises:
        StoreError: They can't be started.
    """
    tell_at_s = time.monotonic() + TELL_AFTER_S
    while not stopping.wait(POLL_S):
        application = serve.status().applications[NAME]
        if application.status == "RUNNING":
            return True
        if application.status in {"DEPLOY_FAILED", "UNHEALTHY"}:
            raise StoreError(
                f"the replicas didn't start: {application.message}",
                hint="Look at Ray's logs; `sisa serve` without --replicas says more.",
            )
        if time.monotonic() > tell_at_s:
            tell_at_s += TELL_AFTER_S
            sys.stderr.write("waiting for the replicas: the cluster may have no free CPU for each of them\n")
            sys.stderr.flush()
    return False


def _check_cluster(replicas: int) -> None:
    """Make sure that the cluster can run the replicas, and that nothing else is served there.

    Raises:
        UserError: It can't, or something is.
    """
    import ray

    here: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    cores = sum(node["Resources"].get("CPU", 0) for node in nodes if node["NodeManagerAddress"] == here)
    if cores < replicas:
        raise UserError(
            f"--replicas: {replicas} processes need a CPU each on this machine, of which the cluster has {cores:g} here",
            hint="Ask for fewer, or give the cluster's node on this machine more.",
        )
    try:
        ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    except ValueError:
        return
    raise UserError(
        "--address: Ray Serve runs on this cluster already, and a cluster has one address for all that it serves",
        hint="End what is served there, take another cluster, or leave --address out.",
    )


def _builder(serving: Serving) -> Any:
    """Return the function that makes the application in the process of each replica."""
    paths = [path or os.getcwd() for path in sys.path]  # noqa: PTH109 - text is what sys.path holds
    alone = replace(serving, repairs=False)

    def build() -> FastAPI:
        sys.path.extend(path for path in paths if path not in sys.path)
        return create_app(alone)

    return build


@contextlib.contextmanager
def _cluster(address: str | None, *, cores: int) -> Iterator[None]:
    from sisa.execution.cluster import connected

    with connected(address, cores=cores):
        yield


def _ray_serve() -> Any:
    """Return the library, which has few types.

    Raises:
        UserError: It isn't there.
    """
    try:
        from ray import serve
    except ImportError as error:
        raise UserError(
            f"--replicas: Ray Serve can't be used here ({error})", hint="Install it: pip install 'sisa[replicas]'."
        ) from error
    return serve


def _free_port(host: str, port: int) -> int:
    """Return a port that can be listened on now."""
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as listening:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(place)
            return int(listening.getsockname()[1])
    except OSError as error:
        raise UserError(
            f"{host}:{port} can't be listened on: {error.strerror or error}", hint="Choose another --port or --host."
        ) from error


@contextlib.contextmanager
def _signals(stopping: threading.Event) -> Iterator[None]:
    """Let SIGINT and SIGTERM end the waiting, in good order. Entered when Ray is there: it takes SIGTERM for itself."""
    before = {number: signal.signal(number, lambda *_: stopping.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
