"""Gradients of the mean cross entropy of a batch, two ways with the same bits.

:class:`AutogradGradients` works for any module. :class:`StackGradients` is for the built-in stacks of linear layers
and activations: it calls the very operations that autograd would call, in the same order and on the same shapes,
but into memory that is kept from step to step, and without building a graph. At small batches that is most of the
time. A test holds one against the other.

Shape suffixes: B batch, I inputs and O outputs of a layer, C classes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from sisa.learners.models import DEFAULT_ACTIVATION, hidden_widths
from sisa.learners.resident import Resident
from sisa.recipe import Recipe

_aten = torch.ops.aten
_MEAN, _IGNORE_NOTHING = 1, -100
"""aten's code of the mean as a reduction; the label that cross entropy leaves out, which no class has."""


class Gradients(Protocol):
    """What a training loop needs of a model."""

    def __call__(self, rows_B: torch.Tensor, labels_B: torch.Tensor) -> Sequence[torch.Tensor | None]:
        """Return one gradient per trainable parameter; their memory may be used again by the next call."""

    def loss(self) -> float:
        """Return the loss of the last batch."""


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained, by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def build_gradients(recipe: Recipe, module: nn.Module, resident: Resident) -> Gradients:
    """Choose the way for the recipe's model."""
    spec = recipe.model
    plain = spec.name in {"mlp", "logistic"} and not spec.dropout and not spec.batch_norm
    # A 1 x 1 matrix counts as transposed for autograd, which then multiplies in another order.
    if plain and 1 not in hidden_widths(spec):
        linears = [layer for layer in module.children() if isinstance(layer, nn.Linear)]
        return StackGradients(linears, spec.activation or DEFAULT_ACTIVATION, resident)
    return AutogradGradients(module, resident)


@contextlib.contextmanager
def batch_norm_frozen(module: nn.Module) -> Iterator[None]:
    """Let BatchNorm use its running statistics: one record has no variance to normalise by."""
    layers = [layer for layer in module.modules() if isinstance(layer, _BatchNorm) and layer.training]
    for layer in layers:
        layer.training = False
    try:
        yield
    finally:
        for layer in layers:
            layer.training = True


class AutogradGradients:
    """Gradients of any module, by autograd."""

    def __init__(self, module: nn.Module, resident: Resident) -> None:
        self._module = module
        self._resident = resident
        self._parameters = list(trainable(module).values())
        self._loss = torch.zeros(())

    def __call__(self, rows_B: torch.Tensor, labels_B: torch.Tensor) -> Sequence[torch.Tensor | None]:
        """Return one gradient per trainable parameter."""
        if len(rows_B) == 1:
            with batch_norm_frozen(self._module):
                scores_BC = self._module(self._resident.batch(rows_B))
        else:
            scores_BC = self._module(self._resident.batch(rows_B))
        self._loss = functional.cross_entropy(scores_BC, labels_B)
        return torch.autograd.grad(self._loss, self._parameters, allow_unused=True)

    def loss(self) -> float:
        """Return the loss of the last batch."""
        return float(self._loss.detach())


@dataclass(frozen=True)
class _Activation:
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    of_output: bool
    """The derivative is computed from the output; else from the input."""
    constants: tuple[object, ...] = ()


_ACTIVATIONS = {
    "relu": _Activation(_aten.relu.out, _aten.threshold_backward.grad_input, of_output=True, constants=(0,)),
    "tanh": _Activation(_aten.tanh.out, _aten.tanh_backward.grad_input, of_output=True),
    "gelu": _Activation(_aten.gelu.out, _aten.gelu_backward.grad_input, of_output=False),
    "silu": _Activation(_aten.silu.out, _aten.silu_backward.grad_input, of_output=False),
}


@dataclass(frozen=True)
class _Layer:
    """A linear layer's parameters (views) and the memory of its gradients."""

    weight_OI: torch.Tensor
    weight_IO: torch.Tensor
    bias_O: torch.Tensor
    weight_gradient_OI: torch.Tensor
    bias_gradient_O: torch.Tensor


@dataclass(frozen=True)
class _Space:
    """What a layer computes for one size of batch, forward and backward."""

    input_BI: torch.Tensor
    linear_BO: torch.Tensor
    output_BO: torch.Tensor
    gradient_BO: torch.Tensor
    gradient_OB: torch.Tensor


class StackGradients:
    """Gradients of linear layers with one activation between them."""

    def __init__(self, linears: Sequence[nn.Linear], activation: str, resident: Resident) -> None:
        self._resident = resident
        self._activation = _ACTIVATIONS[activation]
        self._layers = [_layer(linear) for linear in linears]
        self._gradients = [g for layer in self._layers for g in (layer.weight_gradient_OI, layer.bias_gradient_O)]
        self._spaces: dict[int, tuple[list[_Space], torch.Tensor]] = {}
        self._device = resident.rows_ND.device
        self._one = torch.ones((), device=self._device)
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(self, rows_B: torch.Tensor, labels_B: torch.Tensor) -> Sequence[torch.Tensor | None]:
        """Return one gradient per trainable parameter; their memory is used again by the next call."""
        spaces, count = self._spaces.get(len(rows_B)) or self._make_spaces(len(rows_B))
        torch.index_select(self._resident.rows_ND, 0, rows_B, out=spaces[0].input_BI)
        activation, last = self._activation, spaces[-1]
        for layer, space in zip(self._layers, spaces, strict=True):
            torch.addmm(layer.bias_O, space.input_BI, layer.weight_IO, out=space.linear_BO)
            if space is not last:
                activation.forward(space.linear_BO, out=space.output_BO)
        _aten._log_softmax.out(last.linear_BO, 1, False, out=last.output_BO)
        self._last = (last.output_BO, labels_B)
        # d loss / d log-probabilities lands where d loss / d scores overwrites the space of the last layer.
        likelihood_BC = _aten.nll_loss_backward.default(
            self._one, last.output_BO, labels_B, None, _MEAN, _IGNORE_NOTHING, count
        )
        _aten._log_softmax_backward_data.out(likelihood_BC, last.output_BO, 1, torch.float32, out=last.gradient_BO)
        for index in range(len(spaces) - 1, -1, -1):
            layer, space = self._layers[index], spaces[index]
            torch.sum(space.gradient_BO, 0, out=layer.bias_gradient_O)
            torch.mm(space.gradient_OB, space.input_BI, out=layer.weight_gradient_OI)
            if index:
                below = spaces[index - 1]
                torch.mm(space.gradient_BO, layer.weight_OI, out=below.gradient_BO)
                seen_BO = below.output_BO if activation.of_output else below.linear_BO
                activation.backward(below.gradient_BO, seen_BO, *activation.constants, grad_input=below.gradient_BO)
        return self._gradients

    def loss(self) -> float:
        """Return the loss of the last batch."""
        if self._last is None:
            return 0.0
        return float(functional.nll_loss(*self._last))

    def _make_spaces(self, batch: int) -> tuple[list[_Space], torch.Tensor]:
        def empty(width: int) -> torch.Tensor:
            return torch.empty((batch, width), device=self._device)

        spaces: list[_Space] = []
        input_BI = empty(self._resident.rows_ND.shape[1])
        for layer in self._layers:
            width = len(layer.bias_O)
            gradient_BO = empty(width)
            spaces.append(_Space(input_BI, empty(width), empty(width), gradient_BO, gradient_BO.t()))
            input_BI = spaces[-1].output_BO
        self._spaces[batch] = (spaces, torch.full((), float(batch), device=self._device))
        return self._spaces[batch]


def _layer(linear: nn.Linear) -> _Layer:
    weight_OI, bias_O = linear.weight.detach(), linear.bias.detach()
    return _Layer(weight_OI, weight_OI.t(), bias_O, torch.empty_like(weight_OI), torch.empty_like(bias_O))
