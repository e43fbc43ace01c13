"""Where to run, as the caller asked for it."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from sisa.errors import UserError
from sisa.planning.cost import predicted_seconds
from sisa.planning.placement import Need
from sisa.recipe import Recipe, WorkersSpec

INLINE_BELOW_S = 10.0
"""Ray costs some five seconds to start: work shorter than this runs in the calling process."""
CONNECT_WITHIN_S = 5.0
"""How long a cluster's host may take to accept a connection."""


@dataclass(frozen=True, kw_only=True)
class Execution:
    """Where chains run and how many at a time."""

    executor: Literal["auto", "ray", "inline"] = "auto"
    address: str | None = None
    """A running Ray cluster; without it Ray is started on this machine and stopped afterwards."""
    workers: int | None = None
    """How many chains at a time; by default one a core, and on a running cluster as many as it holds."""
    resources: WorkersSpec | None = None
    """What each worker gets; by default what the store's recipe says."""

    def each(self, recipe: Recipe) -> WorkersSpec:
        """Return what each worker gets when ``recipe``, a store's, is trained."""
        return self.resources or recipe.workers

    def need(self, recipe: Recipe) -> Need:
        """Return what each worker takes of its machine."""
        spec = self.each(recipe)
        devices = recipe.workers.devices_per_shard  # all of them on one machine, where memory is what each needs
        gpus = spec.gpus if spec.gpus is not None else float(devices * (recipe.training.device == "cuda"))
        cpus = spec.cpus or devices * recipe.training.threads
        return Need(cpus=cpus, gpus=gpus, memory_bytes=devices * (spec.memory_bytes or 0))

    def check(self) -> None:
        """Make sure that somebody listens at ``address``: it costs a moment, and is asked before any work is done.

        Whoever listens may still be no cluster, or be gone later: that is noticed when chains are to run. Where no
        address was given, or none is used, there is nothing to check.

        Raises:
            UserError: The address is none, or nobody listens there.
        """
        if self.address is None or self.executor == "inline":
            return
        refuse_client(self.address)
        place = self.address
        if place == "auto":
            from sisa.execution.cluster import running_cluster

            place = running_cluster()
        _connect(self.address, place)

    def uses_ray(self, recipe: Recipe, *, chains: int, record_epochs: int) -> bool:
        """Decide where to run, from sizes alone."""
        if self.executor != "auto":
            return self.executor == "ray"
        if self.address is not None:
            return True
        if chains < 2 or self.worker_count(chains) < 2:
            return False
        seconds = predicted_seconds(
            record_epochs=record_epochs,
            batch_size=recipe.training.batch_size,
            products=_guessed_products(recipe),
        )
        return seconds >= INLINE_BELOW_S

    def limit(self, chains: int) -> int | None:
        """Return how many chains may run at a time; None where a running cluster's size decides."""
        return None if self.address is not None and self.workers is None else self.worker_count(chains)

    def worker_count(self, chains: int) -> int:
        """Return how many chains run at a time on this machine."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
        return max(1, min(self.workers or cores, chains))


def refuse_client(address: str) -> None:
    """Refuse an address of Ray Client, over which events can't be streamed.

    Raises:
        UserError: It is one.
    """
    if "://" in address:
        raise UserError(
            f"--address {address!r}: Ray Client is not supported yet; expected host:port or auto",
            hint="Run the command on a node of the cluster, with --address auto.",
        )


def _connect(address: str, place: str) -> None:
    """Open a connection to ``place`` (host:port) and close it."""
    try:
        parts = urlsplit(f"//{place}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or not port:
        raise UserError(
            f"--address {address!r}: expected host:port or auto",
            hint="Ray says the address when it starts; or leave it out to run on this machine.",
        )
    try:
        socket.create_connection((host, port), timeout=CONNECT_WITHIN_S).close()
    except OSError as error:
        raise UserError(
            f"--address {address!r}: nobody answers at {host}, port {port} ({error.strerror or error})",
            hint="Start the cluster or check the address; or leave it out to run on this machine.",
        ) from error


def _guessed_products(recipe: Recipe) -> int:
    """Guess how many numbers are multiplied for one record, forward."""
    inputs = sum(column.size or 8 for column in recipe.data.columns.values())
    classes, image = len(recipe.data.classes or []), recipe.data.image
    if recipe.model.name == "logistic":
        return inputs * classes
    if recipe.model.name == "mlp":
        return _dense([inputs, *(recipe.model.hidden or [128]), classes])
    if recipe.model.name == "cnn" and image is not None:
        products, pixels, channels = 0, image.height * image.width, image.channels
        for wider in recipe.model.channels or [16, 32]:
            products += pixels * 9 * channels * wider
            pixels, channels = pixels // 4, wider
        return products + _dense([pixels * channels, *(recipe.model.hidden or [64]), classes])
    return 1_000 * inputs + 50_000  # somebody's own model: rather too much than too little


def _dense(widths: list[int]) -> int:
    return sum(a * b for a, b in zip(widths, widths[1:], strict=False))
