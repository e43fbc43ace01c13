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
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sisa.errors import StoreError, UserError
from sisa.serving.app import Serving, create_app
from sisa.serving.repairer import Repairer

if TYPE_CHECKING:
    from fastapi import FastAPI

NAME = "sisa"
LOOK_EVERY_S = 1.0
"""How often open deletions are looked for."""
ONGOING = 100
"""How many requests a replica works on at a time."""
SHUTDOWN_S = 10
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
    address: str | None = None,
    tls: tuple[str, str] | None = None,
) -> None:
    """Serve until the process is told to stop (SIGINT, SIGTERM).

    Args:
        serving: How the store is served.
        replicas: How many processes answer.
        host: Where the proxy listens.
        port: Its port; 0 takes a free one.
        address: A running Ray cluster that this machine belongs to; without it one is started and stopped.
        tls: Certificate and key, PEM files.

    Raises:
        UserError: There is no store, no such cluster, no Ray Serve, or the address can't be listened on.
        StoreError: The store is damaged, or the replicas don't start.
    """
    create_app(serving)  # what is wrong with the store is said before anything is started
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    _ray_serve()
    port = _free_port(host, port)
    stopping = threading.Event()
    with _cluster(address, cores=replicas + 1), _signals(stopping):
        serve = _ray_serve()
        repairer = Repairer(
            serving.layout, executor=serving.executor, address=serving.address, look_every_s=LOOK_EVERY_S
        )
        try:
            _deploy(serve, serving, replicas=replicas, host=host, port=port, tls=tls)
            shown = f"[{host}]" if ":" in host else host
            sys.stderr.write(f"serving {'https' if tls else 'http'}://{shown}:{port}\n")
            sys.stderr.flush()
            if serving.repairs:
                repairer.start()
            stopping.wait()
        finally:
            repairer.stop()
            if address is None:
                serve.shutdown()
            else:
                serve.delete(NAME)  # what else is served there goes on


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
    try:
        serve.run(deployment.bind(), name=NAME, route_prefix="/", logging_config=logs)
    except RuntimeError as error:
        raise StoreError(
            f"the replicas didn't start: {error}", hint="Look at Ray's logs; `sisa serve` without --replicas says more."
        ) from error


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
