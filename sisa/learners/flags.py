"""The process-wide switches that decide bits, set for the length of a training or a prediction and put back.

A caller's own settings (default dtype, device, threads, seeds, precision) can neither get into a stage nor be
lost to one. Seeds derive from text by SHA-256, so that no two uses share a stream of random numbers.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import sys
import threading
from collections.abc import Iterator

import numpy as np
import torch

from sisa.errors import UserError
from sisa.recipe import Recipe

DETERMINISTIC_CUBLAS = ":4096:8"


class FlagsTakenError(Exception):
    """Another thread has set the flags, and whoever asks can't wait for it."""


class Turns:
    """Who may set the flags: they are the process's, and several threads may answer. One thread may enter again."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._here = threading.local()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=not getattr(self._here, "hurried", False)):
            raise FlagsTakenError

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    @contextlib.contextmanager
    def without_waiting(self) -> Iterator[None]:
        """Have this thread refused, for the length of a ``with`` block, where it would have to wait.

        Raises:
            FlagsTakenError: Another thread has the flags.
        """
        self._here.hurried = True
        try:
            yield
        finally:
            self._here.hurried = False


FLAGS = Turns()
"""Held while flags are set to answer."""


def derived_seed(purpose: str, *parts: int) -> int:
    """Return the 64-bit seed of ``purpose``: the first 8 bytes (big-endian) of SHA-256 of [purpose, *parts] as JSON.

    >>> derived_seed("sisa-init", 7, 0)
    12360260169629768318
    """
    text = json.dumps([purpose, *parts], separators=(",", ":"))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def seed_everything(seed: int) -> None:
    """Seed every global generator that a model may draw from: torch's (all devices), numpy's, Python's."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)
    np.random.seed([seed >> 32, seed & 0xFFFFFFFF])  # noqa: NPY002 - a user's model may draw from the global one
    random.seed(seed)


def device_of(recipe: Recipe) -> torch.device:
    """Return the device that the recipe asks for.

    Raises:
        UserError: It asks for a GPU and there is none.
    """
    if recipe.training.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "training.device: cuda, but torch sees no GPU here",
            hint="Run where there is a GPU and a CUDA build of torch, or set training.device: cpu in a new store.",
        )
    return torch.device(recipe.training.device)


class _Nowhere(io.TextIOBase):
    """Takes what is printed."""

    def write(self, text: str) -> int:
        """Drop it."""
        return len(text)


_NOWHERE = _Nowhere()


@contextlib.contextmanager
def training_flags(recipe: Recipe) -> Iterator[None]:
    """Set threads, determinism, precision, dtype, device and gradient mode; restore them and all generators after.

    What a user's model prints meanwhile goes nowhere: it may be somebody's values, which logs would keep.

    Raises:
        UserError: The recipe asks for a GPU and there is none.
    """
    device = device_of(recipe)
    with contextlib.ExitStack() as undo:
        _keep_generators(undo, device)
        _set_numerics(undo, recipe)
        _set_determinism(undo, device)
        undo.enter_context(contextlib.redirect_stdout(_NOWHERE))
        undo.enter_context(torch.inference_mode(mode=False))
        undo.enter_context(torch.enable_grad())
        yield


def _keep_generators(undo: contextlib.ExitStack, device: torch.device) -> None:
    undo.callback(random.setstate, random.getstate())
    undo.callback(np.random.set_state, np.random.get_state())  # noqa: NPY002 - the global one
    undo.callback(torch.set_rng_state, torch.get_rng_state())
    if device.type == "cuda":
        undo.callback(torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all())


def _set_numerics(undo: contextlib.ExitStack, recipe: Recipe) -> None:
    undo.callback(torch.set_num_threads, torch.get_num_threads())
    torch.set_num_threads(recipe.training.threads)
    undo.callback(torch.set_default_dtype, torch.get_default_dtype())
    torch.set_default_dtype(torch.float32)
    if torch.get_default_device().type != "cpu":
        undo.callback(torch.set_default_device, torch.get_default_device())
        torch.set_default_device(None)  # not "cpu": that would put a Python hook into every operation
    undo.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
    torch.set_float32_matmul_precision("highest")
    undo.callback(torch.set_flush_denormal, _denormals_are_flushed())
    torch.set_flush_denormal(False)
    for kind in ("cpu", "cuda"):
        if torch.is_autocast_enabled(kind):
            undo.callback(torch.set_autocast_enabled, kind, True)
            torch.set_autocast_enabled(kind, False)


def _set_determinism(undo: contextlib.ExitStack, device: torch.device) -> None:
    # torch.use_deterministic_algorithms also imports torch's compiler, which takes a second and has no part here.
    undo.callback(
        torch._C._set_deterministic_algorithms,
        torch.are_deterministic_algorithms_enabled(),
        warn_only=torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch._C._set_deterministic_algorithms(True, warn_only=False)
    undo.callback(
        torch._C._set_deterministic_fill_uninitialized_memory, torch._C._get_deterministic_fill_uninitialized_memory()
    )
    torch._C._set_deterministic_fill_uninitialized_memory(False)  # our buffers are always written before they are read
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", DETERMINISTIC_CUBLAS)
        undo.callback(setattr, torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
        torch.backends.cudnn.benchmark = False
        undo.callback(setattr, torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)
        torch.backends.cudnn.allow_tf32 = False


def _denormals_are_flushed() -> bool:
    # In plain arithmetic of this thread: no kernel of a library, with settings of its own, comes in between.
    return sys.float_info.min / 4 == 0.0
