"""Ray jobs: handing a command to a cluster, and watching it from afar.

Here is the client of the cluster's job server only. The command runs on the cluster, as its own driver.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sisa.errors import StoreError, UserError

LOST_AFTER_S = 60.0
"""How long a cluster may be out of reach before the watching ends; the job isn't touched by that."""
LOOK_EVERY_S = 0.5
PACKAGING = "ray._private.runtime_env.packaging"
FAILED = 3
"""Exit code of a job that ended without one: its environment couldn't be made, or its node died."""
STOPPED = 130


@dataclass(frozen=True)
class JobSpec:
    """What a cluster is asked to run."""

    entrypoint: str
    """The command line, which everybody who sees the dashboard can read."""
    folder: Path
    """Its working folder: sent along with everything in it."""
    package: Path | None
    """The package to run, as a folder that is sent along; None takes the one that is installed there."""
    cpus: float = 0.0
    """Cores that are kept for the command itself; its workers ask for their own."""


@dataclass(frozen=True)
class JobEnd:
    """How a job ended."""

    status: str
    exit_code: int
    message: str = ""
    """What Ray says of a job that ended without an exit code."""


class Jobs:
    """The job server of a cluster."""

    def __init__(self, address: str) -> None:
        """Connect.

        Args:
            address: Of the dashboard, ``http://host:8265``.

        Raises:
            UserError: It is no such address, or no job server that lets us in answers there.
        """
        if not address.startswith(("http://", "https://")):
            raise UserError(
                f"--address {address!r}: expected the cluster's dashboard, such as http://head:8265",
                hint="Jobs go to the dashboard's port; the port 6379 is for commands that run on the cluster.",
            )
        # Whoever reaches an open job server runs what they like beside people's rows.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        self.address = address
        self._client = _client(address)

    def submit(self, spec: JobSpec) -> str:
        """Hand a job over; return its id.

        Raises:
            StoreError: The cluster refused.
        """
        environment: dict[str, Any] = {"working_dir": str(spec.folder)}
        if spec.package is not None:
            environment["py_modules"] = [str(spec.package)]
        try:
            job: str = self._client.submit_job(
                entrypoint=spec.entrypoint, runtime_env=environment, entrypoint_num_cpus=spec.cpus or None
            )
        except (RuntimeError, OSError, ValueError) as error:
            raise StoreError(
                f"the cluster at {self.address} didn't take the job: {_first_line(error)}",
                hint="Look at the dashboard: is the head up, and has it room?",
            ) from error
        return job

    def stop(self, job: str) -> None:
        """Ask a job to end; what it has finished is kept.

        Raises:
            UserError: There is no such job.
        """
        self._known(lambda: self._client.stop_job(job), job)

    def follow(self, job: str, write: Callable[[str], None]) -> JobEnd:
        """Pass on a job's log until it has ended, across breaks of the connection.

        Args:
            job: Its id.
            write: Takes pieces of the log as they come.

        Raises:
            UserError: There is no such job.
            StoreError: The cluster was out of reach for too long.
        """
        self._known(lambda: self._client.get_job_status(job), job)
        log = _Log(write)
        reached = time.monotonic()
        while True:
            try:
                asyncio.run(log.drain(self._client.tail_job_logs(job)))
                info = self._client.get_job_info(job)
                if info.status.is_terminal():
                    log.take_whole(self._client.get_job_logs(job))
                    return _end(info)
                reached = time.monotonic()
            except (RuntimeError, OSError) as error:  # aiohttp's and requests' errors are kinds of these, or below
                if time.monotonic() - reached > LOST_AFTER_S:
                    raise StoreError(
                        f"the cluster at {self.address} was out of reach for {LOST_AFTER_S:.0f} s: {_first_line(error)}",
                        hint=f"Job {job} may go on: look at it again with --attach {job}.",
                    ) from error
            time.sleep(LOOK_EVERY_S)

    def _known(self, call: Callable[[], object], job: str) -> None:
        try:
            call()
        except (RuntimeError, OSError) as error:
            raise UserError(
                f"job {job!r} isn't known to the cluster at {self.address}: {_first_line(error)}",
                hint="`ray job list` shows those that are.",
            ) from error


class _Log:
    """A log that is read from its start again after a break, and passed on once."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._passed = 0

    async def drain(self, pieces: AsyncIterator[str]) -> None:
        """Pass on what is new in one reading of the log."""
        seen = 0
        try:
            async for piece in pieces:
                new = piece[max(0, self._passed - seen) :]
                seen += len(piece)
                self._pass(new)
        except Exception as error:
            from aiohttp import ClientError

            if isinstance(error, ClientError):
                raise RuntimeError(_first_line(error)) from error
            raise

    def take_whole(self, text: str) -> None:
        """Pass on what the last reading missed."""
        self._pass(text[self._passed :])

    def _pass(self, text: str) -> None:
        if text:
            self._passed += len(text)
            self._write(text)


def _client(address: str) -> Any:
    try:
        from ray.job_submission import JobSubmissionClient
    except ImportError as error:
        raise UserError(
            f"Ray's job client can't be used here ({error})", hint="Install it: pip install 'sisa[jobs]'."
        ) from error
    for name in ("ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk", PACKAGING):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        return JobSubmissionClient(address)
    except Exception as error:  # Ray raises its own kinds, requests' and bare ones
        raise UserError(
            f"--address {address!r}: no job server lets us in there: {_first_line(error)}",
            hint="Check the address, and the token: RAY_AUTH_TOKEN_PATH names the file that holds it.",
        ) from error


def _end(info: Any) -> JobEnd:
    status = str(info.status.value)
    code = info.driver_exit_code
    if status == "SUCCEEDED":
        return JobEnd(status, 0)
    if status == "STOPPED":
        return JobEnd(status, STOPPED, "the job was stopped")
    # A negative code is a signal's: as a shell counts it.
    if code:
        return JobEnd(status, code if code > 0 else 128 - code)
    return JobEnd(status, FAILED, _first_line(info.message or "the job ended without saying why"))


def _first_line(error: object) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
