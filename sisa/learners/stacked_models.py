"""Constituents of one structure, evaluated together: one batched product instead of S small ones.

Two ways. :class:`DenseStack` knows chains of ``Linear``, ``BatchNorm1d``, activations and ``Dropout``, whoever brings
them; :class:`VmapStack` takes any module that ``torch.vmap`` takes, if the constituents differ in nothing but
parameters and buffers. Neither gives the bits of a constituent that answers alone (sums are added up in another order),
so both only propose: see :mod:`sisa.ensemble.stacked`.

Shape suffixes: S constituents, B rows, D elements of a row, H width of a layer, C classes.
"""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from sisa.learners.alike import alike
from sisa.learners.columns import Columns
from sisa.learners.flags import FLAGS, device_of, training_flags
from sisa.learners.models import wants_channels_last
from sisa.learners.predict import Constituent
from sisa.learners.stacked_rows import RowStack, structure
from sisa.recipe import Recipe

ELEMENTWISE = (nn.ReLU, nn.Tanh, nn.GELU, nn.SiLU)
Layer = Callable[[torch.Tensor], torch.Tensor]


class RefusedError(Exception):
    """These constituents can't be evaluated together; each has to answer alone."""


class Stack(Protocol):
    """Several constituents that answer together."""

    path: str
    """What the way is called."""

    def logits(self, columns: Columns) -> torch.Tensor:
        """Return each constituent's scores before the softmax: (S, B, C).

        Raises:
            RefusedError: They have to answer alone.
        """
        ...


def dense_key(constituent: Constituent) -> tuple[object, ...] | None:
    """Return what constituents of one :class:`DenseStack` have in common; None if it can't take this one."""
    layers = _dense_layers(constituent)
    if layers is None:
        return None
    linear = (layer for layer in layers if isinstance(layer, nn.Linear))
    next(linear)  # its inputs may differ: vocabularies do
    widths = [(layer.in_features, layer.out_features, layer.bias is None) for layer in linear]
    kinds = [repr(layer) for layer in layers if not isinstance(layer, nn.Linear)]
    first = next(layer for layer in layers if isinstance(layer, nn.Linear))
    order = [type(layer).__name__ for layer in layers]
    return (
        *structure(constituent.preprocessor),
        first.out_features,
        first.bias is None,
        tuple(widths),
        tuple(kinds),
        tuple(order),
    )


def _dense_layers(constituent: Constituent) -> list[nn.Module] | None:
    """Return the layers of a module that is a plain chain of what :class:`DenseStack` knows."""
    module = constituent.module
    if type(module) is not nn.Sequential or not _untouched(module):
        return None
    layers = list(module)
    if layers and type(layers[0]) is nn.Flatten and (layers[0].start_dim, layers[0].end_dim) == (1, -1):
        layers = layers[1:]
    elif len(constituent.preprocessor.feature_shape) > 1:
        return None
    if not layers or type(layers[0]) is not nn.Linear or not all(_known(layer) for layer in layers):
        return None
    return layers


def _known(layer: nn.Module) -> bool:
    if type(layer) is nn.BatchNorm1d:
        known = layer.running_mean is not None
    elif type(layer) is nn.Dropout:
        known = not layer.training
    else:
        known = type(layer) is nn.Linear or type(layer) in ELEMENTWISE
    floats = all(tensor.dtype == torch.float32 for tensor in layer.parameters())
    return known and floats and not layer.training and _untouched(layer)


def _untouched(module: nn.Module) -> bool:
    """Whether calling a module is what its class says: no hooks, no ``forward`` of its own."""
    state = vars(module)
    return "forward" not in state and not state["_forward_hooks"] and not state["_forward_pre_hooks"]


class DenseStack:
    """Chains of dense layers: one batched product per layer, on rows that are scaled for all at once."""

    path = "stacked"

    def __init__(self, recipe: Recipe, constituents: Sequence[Constituent]) -> None:
        self._recipe = recipe
        self._device = device_of(recipe)
        self._rows = RowStack([c.preprocessor for c in constituents])
        self._image_shape = constituents[0].preprocessor.image_shape
        self._count = len(constituents)
        chains = [_dense_layers(c) or [] for c in constituents]
        with FLAGS, training_flags(recipe), torch.no_grad():
            self._layers: list[Layer] = [self._first([chain[0] for chain in chains])]
            for layers in list(zip(*chains, strict=True))[1:]:
                if not isinstance(layers[0], nn.Dropout):
                    self._layers.append(_stacked(layers))

    def logits(self, columns: Columns) -> torch.Tensor:
        """Return each constituent's scores before the softmax: (S, B, C)."""
        rows_SBD = self._rows.rows(columns)
        with kernel_flags(self._recipe, self._device), torch.inference_mode():
            values_SBH = _placed(rows_SBD, self._image_shape).to(self._device)
            values_SBH = values_SBH.expand(self._count, -1, -1)
            for layer in self._layers:
                values_SBH = layer(values_SBH)
            return values_SBH

    def _first(self, layers: Sequence[Any]) -> Layer:
        """Stack the layers that see the rows: places that aren't a constituent's own have weight 0."""
        weight_SDH = torch.zeros((len(layers), self._rows.width, layers[0].out_features), device=self._device)
        for index, (layer, places) in enumerate(zip(layers, self._rows.places, strict=True)):
            weight_SDH[index, torch.as_tensor(places, device=self._device)] = layer.weight.T
        return _linear(weight_SDH, layers)


def _stacked(layers: Sequence[Any]) -> Layer:
    """Return one function for the same layer of each constituent."""
    if isinstance(layers[0], nn.Linear):
        return _linear(torch.stack([layer.weight.T for layer in layers]).contiguous(), layers)
    if isinstance(layers[0], nn.BatchNorm1d):
        return _normalised(layers)
    activation: Layer = layers[0]
    return activation


def _linear(weight_SDH: torch.Tensor, layers: Sequence[Any]) -> Layer:
    if layers[0].bias is None:
        return lambda values_SBD: torch.bmm(values_SBD, weight_SDH)
    bias_S1H = torch.stack([layer.bias for layer in layers]).unsqueeze(1)
    return lambda values_SBD: torch.baddbmm(bias_S1H, values_SBD, weight_SDH)


def _normalised(layers: Sequence[Any]) -> Layer:
    """In evaluation mode the statistics are constants: the layer is a factor and a summand."""
    factors, summands = [], []
    for layer in layers:
        factor_H = torch.rsqrt(layer.running_var + layer.eps)
        factor_H = factor_H if layer.weight is None else factor_H * layer.weight
        summand_H = -layer.running_mean * factor_H
        factors.append(factor_H)
        summands.append(summand_H if layer.bias is None else summand_H + layer.bias)
    factor_S1H, summand_S1H = torch.stack(factors).unsqueeze(1), torch.stack(summands).unsqueeze(1)
    return lambda values_SBH: torch.addcmul(summand_S1H, values_SBH, factor_S1H)


def _placed(rows_SBD: torch.Tensor, image_shape: tuple[int, int, int] | None) -> torch.Tensor:
    """Put the pixels of images channels first, as a module that isn't channels last sees them."""
    if image_shape is None or image_shape[2] == 1:
        return rows_SBD
    height, width, channels = image_shape
    images = rows_SBD.view(*rows_SBD.shape[:2], height, width, channels).permute(0, 1, 4, 2, 3)
    return images.reshape(rows_SBD.shape)


class VmapStack:
    """Any module: one call for all constituents, by ``torch.vmap`` over their parameters and buffers."""

    path = "vmap"

    def __init__(self, recipe: Recipe, constituents: Sequence[Constituent]) -> None:
        """Stack what differs.

        Raises:
            RefusedError: The modules differ in more than parameters and buffers, or can't be copied.
        """
        first = constituents[0]
        self._recipe = recipe
        self._device = device_of(recipe)
        self._rows = RowStack([c.preprocessor for c in constituents])
        self._shape = first.preprocessor.feature_shape
        self._image_shape = first.preprocessor.image_shape
        with FLAGS, training_flags(recipe), torch.no_grad():
            try:
                if any(isinstance(part, nn.modules.conv._ConvNd) for part in first.module.modules()):
                    raise RefusedError("convolutions are slower together than one by one")
                if not all(alike(first.module, other.module) for other in constituents[1:]):
                    raise RefusedError("the modules differ in more than parameters and buffers")
                self._module = copy.deepcopy(first.module)  # what it keeps of a call is no constituent's
                self._state = _stacked_state([c.module for c in constituents])
            except RefusedError:
                raise
            except Exception as error:  # what a module keeps may be anything
                raise RefusedError(f"the modules can't be stacked: {error}") from error

    def logits(self, columns: Columns) -> torch.Tensor:
        """Return each constituent's scores before the softmax: (S, B, C).

        Raises:
            RefusedError: vmap can't take the module, or it draws random numbers.
        """
        rows_SBD = self._rows.rows(columns)
        with FLAGS, training_flags(self._recipe), torch.no_grad():
            drawn = _generators()
            try:
                logits_SBC = self._evaluated(self._shaped(rows_SBD.to(self._device)))
            except Exception as error:  # whatever a module does under vmap that it doesn't alone
                raise RefusedError(f"torch.vmap refuses the module: {error}") from error
            if _generators() != drawn:
                raise RefusedError("the module draws random numbers")
        return logits_SBC

    def _evaluated(self, batch: torch.Tensor) -> torch.Tensor:
        def one(parameters: dict[str, Any], buffers: dict[str, Any], rows: torch.Tensor) -> Any:
            return torch.func.functional_call(self._module, (parameters, buffers), (rows,))

        if self._rows.shared:
            logits_SBC = torch.vmap(one, in_dims=(0, 0, None))(*self._state, batch[0])
        else:
            logits_SBC = torch.vmap(one)(*self._state, batch)
        if not isinstance(logits_SBC, torch.Tensor) or logits_SBC.dim() != 3:
            raise RefusedError("the module doesn't return one tensor of scores")
        return logits_SBC

    def _shaped(self, rows_SBD: torch.Tensor) -> torch.Tensor:
        if self._image_shape is None:
            return rows_SBD
        if not wants_channels_last(self._recipe):
            return _placed(rows_SBD, self._image_shape).reshape(*rows_SBD.shape[:2], *self._shape)
        height, width, channels = self._image_shape
        return rows_SBD.view(*rows_SBD.shape[:2], height, width, channels).permute(0, 1, 4, 2, 3)


def _stacked_state(modules: Sequence[nn.Module]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return parameters and buffers, each with the constituents first. Classes may differ: some factories define them."""
    parameters = [dict(module.named_parameters()) for module in modules]
    buffers = [dict(module.named_buffers()) for module in modules]
    return (
        {name: torch.stack([own[name].detach() for own in parameters]) for name in parameters[0]},
        {name: torch.stack([own[name] for own in buffers]) for name in buffers[0]},
    )


def vmap_key(constituent: Constituent) -> tuple[object, ...]:
    """Return what constituents must have in common for a :class:`VmapStack` to be worth a try."""
    tensors = [*constituent.module.named_parameters(), *constituent.module.named_buffers()]
    return (
        *structure(constituent.preprocessor),
        constituent.preprocessor.widths,
        tuple((name, tuple(t.shape)) for name, t in tensors),
    )


def _generators() -> tuple[object, ...]:
    name, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002 - the global one
    return random.getstate(), name, np.asarray(keys).tobytes(), *rest, bytes(torch.get_rng_state().numpy())


@contextlib.contextmanager
def kernel_flags(recipe: Recipe, device: torch.device) -> Iterator[None]:
    """Set what decides the precision of matrix products, where nothing random and no user's code runs.

    On the CPU that is a few of the switches of :func:`sisa.learners.flags.training_flags`, in a tenth of its time.
    """
    if device.type != "cpu":
        with FLAGS, training_flags(recipe):
            yield
        return
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    autocast = torch.is_autocast_enabled("cpu")
    try:
        if threads != recipe.training.threads:
            torch.set_num_threads(recipe.training.threads)
        if precision != "highest":
            torch.set_float32_matmul_precision("highest")
        if autocast:
            torch.set_autocast_enabled("cpu", False)
        yield
    finally:
        if threads != recipe.training.threads:
            torch.set_num_threads(threads)
        if precision != "highest":
            torch.set_float32_matmul_precision(precision)
        if autocast:
            torch.set_autocast_enabled("cpu", True)
