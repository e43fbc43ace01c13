"""Connections that say nothing are closed: else a few hundred of them, for which nobody needs a token, keep all others out.

How long a request may take is counted from its head on (:class:`sisa.serving.limits.TimeLimit`); this is about the time
before: from the connection, or the end of the answer before, to the end of a head.
"""

from __future__ import annotations

import asyncio
from typing import cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_S = 10.0
"""How long a head may take. Between requests uvicorn's own limit is shorter, but ends with a head's first byte."""


class Impatient(HttpToolsProtocol):
    """Uvicorn's protocol, with a limit on the time for which a request's head is waited."""

    _closing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for a first request."""
        super().connection_made(cast("asyncio.Transport", transport))
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._stop_waiting()
        super().connection_lost(exc)

    def on_headers_complete(self) -> None:
        """Wait no more: a request has begun."""
        self._stop_waiting()
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        """Wait for the next request, unless it has come already."""
        super().on_response_complete()
        if not self.transport.is_closing() and (self.cycle is None or self.cycle.response_complete):
            self._wait()

    def _wait(self) -> None:
        self._stop_waiting()
        self._closing = self.loop.call_later(HEAD_S, self._close)

    def _stop_waiting(self) -> None:
        if self._closing is not None:
            self._closing.cancel()
            self._closing = None

    def _close(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()
