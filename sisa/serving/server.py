"""One process that listens: the application on uvicorn."""

from __future__ import annotations

import gc
import resource
import signal
import socket
import ssl
import sys
from pathlib import Path

import uvicorn

from sisa.errors import StoreError, UserError
from sisa.serving.app import Serving, create_app
from sisa.serving.connections import Impatient
from sisa.serving.logs import log_config
from sisa.serving.shortcut import Shortcut

SHUTDOWN_S = 10
"""How long requests may take to end after the server was told to stop."""
MOST_FILES = 65_536


def run(serving: Serving, *, host: str, port: int, tls: tuple[str, str] | None = None) -> None:
    """Serve until the process is told to stop (SIGINT, SIGTERM).

    Raises:
        UserError: There is no store, the address can't be listened on, or the TLS files can't be used.
        StoreError: The store is damaged, or the server didn't come up.
    """
    check_tls(tls)
    app = create_app(serving, access=sys.stderr)
    listening = _listen(host, port)
    shown = f"[{host}]" if ":" in host else host
    scheme = "https" if tls else "http"
    sys.stderr.write(f"serving {scheme}://{shown}:{listening.getsockname()[1]}\n")
    sys.stderr.flush()
    _allow_many_connections()
    config = uvicorn.Config(
        Shortcut(app),
        http=Impatient,
        proxy_headers=False,  # anybody can write them: a peer is who is connected
        log_config=log_config(),
        access_log=False,
        ws="none",
        server_header=False,
        timeout_graceful_shutdown=SHUTDOWN_S,
        ssl_certfile=tls[0] if tls else None,
        ssl_keyfile=tls[1] if tls else None,
    )
    server = uvicorn.Server(config)
    _end_quietly(server)
    gc.collect()
    gc.freeze()  # what was imported stays: looking through it again and again would cost each request a little
    server.run(sockets=[listening])
    if not server.started:
        raise StoreError("the server didn't come up", hint="The lines above say where it failed.")


def _allow_many_connections() -> None:
    """Raise the number of open files to what the system allows this process: each connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or soft < min(hard, MOST_FILES):
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, MOST_FILES)), hard))


def _end_quietly(server: uvicorn.Server) -> None:
    """Make an asked-for end a success. The server repeats the signal when it has shut down; then nothing is left to do."""

    def told(_: int, __: object) -> None:
        if not server.started:
            sys.exit(0)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, told)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise UserError(
            f"{host}:{port} can't be listened on: {reason}", hint="Choose another --port or --host."
        ) from error
    listening.listen(2048)
    return listening


def check_tls(tls: tuple[str, str] | None) -> None:
    """Make sure that a certificate and its key can be used; None is no TLS.

    Raises:
        UserError: They can't.
    """
    if tls is None:
        return
    certificate, key = tls
    for name in tls:
        if not Path(name).is_file():
            raise UserError(f"TLS file {name!r}: there is no such file", hint="Give PEM files.")
    try:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate, key, password="")  # without one it would ask the terminal
    except (OSError, ValueError) as error:
        raise UserError(
            f"TLS: {certificate!r} and {key!r} can't be used together: {type(error).__name__}",
            hint="Give a PEM certificate and its private key, without a password.",
        ) from error
