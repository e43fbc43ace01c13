"""Built-in models, and the models that users bring.

A model is a plain ``torch.nn.Module``: rows in, one score per class out. It is built again for every stage, from
the same seed, and then takes its parameters and buffers from the stage before.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from sisa.errors import SisaError, UserError
from sisa.learners.loaded import load
from sisa.recipe import ModelSpec, Recipe

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU, "silu": nn.SiLU}
DEFAULT_ACTIVATION = "relu"
DEFAULT_HIDDEN = {"mlp": [128], "cnn": [64], "logistic": []}
DEFAULT_CHANNELS = [16, 32]


def build_model(recipe: Recipe, feature_shape: tuple[int, ...], class_count: int) -> nn.Module:
    """Build the recipe's model, in float32 on the CPU, with whatever seed is set.

    Args:
        recipe: A resolved recipe.
        feature_shape: (D,), or (channels, height, width) of an image.
        class_count: Scores that the model gives per row.

    Raises:
        UserError: The factory can't be found, fails or returns something that isn't a module that can be trained.
    """
    spec = recipe.model
    if spec.factory is not None:
        return _user_model(spec, feature_shape, class_count)
    if spec.name == "cnn":
        return _cnn(spec, feature_shape, class_count)
    return _mlp(spec, feature_shape, class_count)


def wants_channels_last(recipe: Recipe) -> bool:
    """Whether batches of images lie channels last in memory: for the built-in cnn, which is faster so."""
    return recipe.model.name == "cnn"


def hidden_widths(spec: ModelSpec) -> list[int]:
    """Widths of the hidden layers of a built-in model."""
    return list(DEFAULT_HIDDEN[spec.name or "mlp"] if spec.hidden is None else spec.hidden)


def _dense(spec: ModelSpec, inputs: int, class_count: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for width in hidden_widths(spec):
        layers.append(nn.Linear(inputs, width))
        if spec.batch_norm:
            layers.append(nn.BatchNorm1d(width))
        layers.append(ACTIVATIONS[spec.activation or DEFAULT_ACTIVATION]())
        if spec.dropout:
            layers.append(nn.Dropout(spec.dropout))
        inputs = width
    layers.append(nn.Linear(inputs, class_count))
    return layers


def _mlp(spec: ModelSpec, feature_shape: tuple[int, ...], class_count: int) -> nn.Sequential:
    inputs = 1
    for size in feature_shape:
        inputs *= size
    layers = _dense(spec, inputs, class_count)
    # Names that don't depend on whether rows are images: parameters are called the same.
    named = OrderedDict((str(index), layer) for index, layer in enumerate(layers))
    if len(feature_shape) > 1:
        named = OrderedDict([("flatten", nn.Flatten()), *named.items()])
    return nn.Sequential(named)


def _cnn(spec: ModelSpec, feature_shape: tuple[int, ...], class_count: int) -> nn.Sequential:
    channels, height, width = feature_shape
    widths = DEFAULT_CHANNELS if spec.channels is None else spec.channels
    layers: list[nn.Module] = []
    for outputs in widths:
        layers.append(nn.Conv2d(channels, outputs, kernel_size=3, padding=1))
        if spec.batch_norm:
            layers.append(nn.BatchNorm2d(outputs))
        layers += [ACTIVATIONS[spec.activation or DEFAULT_ACTIVATION](), nn.MaxPool2d(2)]
        channels, height, width = outputs, height // 2, width // 2
    if height < 1 or width < 1:
        raise UserError(
            f"model.channels: {len(widths)} convolutions halve an image of {feature_shape[1]} x {feature_shape[2]} "
            "to nothing",
            hint="List fewer channels, for example model.channels: [16].",
        )
    layers += [nn.Flatten(), *_dense(spec, channels * height * width, class_count)]
    model = nn.Sequential(*layers)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs leave it out
    return model


def _user_model(spec: ModelSpec, feature_shape: tuple[int, ...], class_count: int) -> nn.Module:
    build = load_factory(spec.factory or "")
    try:
        model = build(feature_shape, class_count, **spec.options)
    except SisaError:
        raise  # what it imports isn't what it was
    except Exception as error:
        raise UserError(
            f"model.factory: {spec.factory} failed with {type(error).__name__}: {error}",
            hint="It is called as build(feature_shape, class_count, **model.options).",
        ) from error
    if not isinstance(model, nn.Module):
        raise UserError(f"model.factory: {spec.factory} returned {type(model).__name__}, expected a torch.nn.Module")
    _refuse_unsupported(spec.factory or "", model)
    return model.to("cpu")


def load_factory(factory: str) -> Callable[..., Any]:
    """Import ``package.module:function``; packages in the current folder are found as well.

    Raises:
        UserError: There is no such module or function.
        FootingError: The module's source is another than this process checked.
    """
    module_name, _, function_name = factory.partition(":")
    module = load(module_name)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"model.factory: {module_name!r} has no function {function_name!r}")
    found: Callable[..., Any] = function
    return found


def _refuse_unsupported(factory: str, model: nn.Module) -> None:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    if any(isinstance(tensor, UninitializedParameter | UninitializedBuffer) for _, tensor in tensors):
        raise UserError(
            f"model.factory: {factory} uses lazy modules, which are not supported yet",
            hint="Build layers with the sizes that feature_shape gives.",
        )
    for name, tensor in tensors:
        if tensor.dtype == torch.bfloat16 or tensor.is_complex() or tensor.is_quantized or tensor.is_sparse:
            kind = "sparse" if tensor.is_sparse else str(tensor.dtype).removeprefix("torch.")
            raise UserError(f"model.factory: {factory}: {name} is {kind}, which is not supported yet; expected float32")
    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise UserError(
                f"model.factory: {factory}: module {name!r} keeps extra state outside of parameters and buffers, "
                "which is not supported yet",
                hint="Register what it keeps with register_buffer.",
            )
