"""Connections that say nothing are closed: else a few hundred of them, for which nobody needs a token, keep all others out.

How long a request may take is counted from its head on (:class:`sisa.serving.limits.TimeLimit`); this is about the time
before: from the connection, or the end of the answer before, to the end of a head. A request only notes the time; one
timer for all connections looks at these notes.
"""

from __future__ import annotations

import asyncio
import math
from typing import cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

HEAD_S = 10.0
"""How long a head may take. Between requests uvicorn's own limit is shorter, but ends with a head's first byte."""
LOOK_EVERY_S = 1.0


class Impatient(HttpToolsProtocol):
    """Uvicorn's protocol, with a limit on the time for which a request's head is waited."""

    waiting_since_s = math.inf
    """On the event loop's clock; not while a request is answered."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for a first request."""
        super().connection_made(cast("asyncio.Transport", transport))
        self.waiting_since_s = self.loop.time()
        _watch(self.server_state, self.loop)

    def on_headers_complete(self) -> None:
        """Wait no more: a request has begun."""
        self.waiting_since_s = math.inf
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        """Wait for the next request, unless it has come already."""
        super().on_response_complete()
        if self.cycle is None or self.cycle.response_complete:
            self.waiting_since_s = self.loop.time()


def _watch(state: ServerState, loop: asyncio.AbstractEventLoop) -> None:
    """Look at a server's connections again and again, as long as it has any."""
    if vars(state).get("watched"):
        return
    state.watched = True  # type: ignore[attr-defined]  # ours: one timer for each server

    def look() -> None:
        late_s = loop.time() - HEAD_S
        for connection in list(state.connections):
            if isinstance(connection, Impatient) and connection.waiting_since_s < late_s:
                connection.transport.close()
        if state.connections:
            loop.call_later(LOOK_EVERY_S, look)
        else:
            state.watched = False  # type: ignore[attr-defined]

    loop.call_later(LOOK_EVERY_S, look)
