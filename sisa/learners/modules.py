"""Parameters and buffers of a module, in and out of a state."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from sisa.learners.columns import Array
from sisa.state import StageState

INIT_SEED = "rng.init"
"""Scalar of a state, 16 hex digits: the seed that the model is built with, in every stage and for predictions, so
that constants which a module draws but doesn't register are the same each time."""


def init_seed(state: StageState) -> int:
    """Return the seed that the model of ``state`` is built with."""
    return int(str(state.scalars[INIT_SEED]), 16)


def to_array(tensor: torch.Tensor) -> Array:
    """Return a tensor's values, row by row in memory; shared with the tensor where that is possible."""
    array: Array = np.asarray(tensor.detach().cpu().numpy(), order="C")
    return array


def dump_module(module: nn.Module) -> dict[str, Array]:
    """Return every parameter (``model.``) and every buffer (``buffer.``), persistent or not, by name."""
    tensors = {f"model.{name}": to_array(tensor) for name, tensor in module.named_parameters()}
    return tensors | {f"buffer.{name}": to_array(tensor) for name, tensor in module.named_buffers()}


def restore_module(module: nn.Module, state: StageState) -> None:
    """Give a module the parameters and buffers of a stage.

    Raises:
        ValueError: Names or shapes of the stage are not those of the module.
    """
    tensors: dict[str, torch.Tensor] = {f"model.{name}": tensor for name, tensor in module.named_parameters()}
    tensors |= {f"buffer.{name}": tensor for name, tensor in module.named_buffers()}
    held = {name for name in state.tensors if name.startswith(("model.", "buffer."))}
    if held != tensors.keys():
        raise ValueError(f"the stage and the model differ in {', '.join(sorted(held ^ tensors.keys()))}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            array = state.tensors[name]
            if tuple(array.shape) != tuple(tensor.shape):
                raise ValueError(f"{name}: the stage has shape {array.shape}, the model {tuple(tensor.shape)}")
            tensor.copy_(torch.tensor(array))
