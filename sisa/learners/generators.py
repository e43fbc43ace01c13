"""Where every global generator of random numbers stands, in and out of a state.

Each epoch seeds them all, so a stage needs nothing of the kind. A recovery snapshot in the middle of an epoch does:
dropout, or a user's model, has drawn from them since.
"""

from __future__ import annotations

import random
from typing import cast

import numpy as np
import torch

from sisa.learners.modules import to_array
from sisa.state import JSON, StageState

TORCH, NUMPY, PYTHON = "rng.torch", "rng.numpy", "rng.python"
CUDA = "rng.cuda."


def dump_generators() -> StageState:
    """Return where torch's generators (all devices), numpy's and Python's stand."""
    name, words, position, has_gauss, gauss = cast(
        "tuple[str, np.ndarray[tuple[int], np.dtype[np.uint32]], int, int, float]",
        np.random.get_state(),  # noqa: NPY002 - a user's model may draw from the global one
    )
    version, numbers, left = random.getstate()
    tensors = {
        TORCH: to_array(torch.default_generator.get_state().clone()),
        NUMPY: np.array(words, np.uint32),
        PYTHON: np.array(numbers, np.uint32),
    }
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states = enumerate(torch.cuda.get_rng_state_all())
        tensors |= {f"{CUDA}{index}": to_array(state.clone()) for index, state in states}
    scalars: dict[str, JSON] = {NUMPY: [name, int(position), int(has_gauss), float(gauss)], PYTHON: [version, left]}
    return StageState(tensors, scalars)


def restore_generators(state: StageState) -> None:
    """Put the generators where :func:`dump_generators` found them."""
    name, position, has_gauss, gauss = cast("tuple[str, int, int, float]", state.scalars[NUMPY])
    version, left = cast("tuple[int, float | None]", state.scalars[PYTHON])
    torch.default_generator.set_state(torch.tensor(state.tensors[TORCH]))
    words = np.array(state.tensors[NUMPY], np.uint32)
    np.random.set_state((name, words, position, has_gauss, gauss))  # noqa: NPY002
    random.setstate((version, tuple(int(number) for number in state.tensors[PYTHON]), left))
    for tensor_name, array in state.tensors.items():
        if tensor_name.startswith(CUDA):
            torch.cuda.set_rng_state(torch.tensor(array), int(tensor_name.removeprefix(CUDA)))
