"""Optimisers that take gradients as arguments and give back their whole state.

Plain and momentum SGD is our own: bit-equal to ``torch.optim.SGD``, without the second that importing ``torch.optim``
takes, and with one call for all parameters. Everything else is torch's class behind the same three methods. No
optimiser may change a gradient in place: the caller may reuse its memory for the next step.

Names in a state: ``optimizer.PARAMETER.SLOT`` for what belongs to a parameter (a tensor or a number), and
``optimizer.groups`` for the settings that torch keeps per group, the learning rate among them.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch

from sisa.errors import UserError
from sisa.learners.columns import Array
from sisa.learners.modules import to_array
from sisa.recipe import OptimizerSpec, Recipe
from sisa.state import JSON, StageState

if TYPE_CHECKING:
    from torch.optim import Optimizer as TorchClass

PREFIX = "optimizer."
GROUPS = "optimizer.groups"
TORCH_NAMES = {"sgd": "torch.optim.SGD", "adam": "torch.optim.Adam", "adamw": "torch.optim.AdamW"}


class Optimizer(Protocol):
    """What a training loop needs of an optimiser."""

    lr: float
    """Learning rate of the next step."""

    def step(self, gradients: Sequence[torch.Tensor | None]) -> None:
        """Change the parameters; ``gradients`` has one entry per parameter, None where the loss doesn't reach."""

    def dump(self) -> StageState:
        """Return the whole state."""

    def restore(self, state: StageState) -> None:
        """Take over the state of a stage."""


def build_optimizer(recipe: Recipe, named: dict[str, torch.nn.Parameter]) -> Optimizer:
    """Build the recipe's optimiser for the trainable parameters ``named``.

    Raises:
        UserError: The class doesn't exist, its arguments are wrong, or its state can't be kept.
    """
    spec = recipe.training.optimizer
    schedule = recipe.training.schedule
    if spec.name == "sgd" and (schedule is None or not schedule.name.startswith("torch.")):
        return SGD(spec, named)
    return TorchOptimizer(spec, named)


def implementation(recipe: Recipe) -> str:
    """Name the code that makes the steps, for the platform's fingerprint."""
    spec, schedule = recipe.training.optimizer, recipe.training.schedule
    own = spec.name == "sgd" and (schedule is None or not schedule.name.startswith("torch."))
    return "sisa.SGD" if own else TORCH_NAMES.get(spec.name, spec.name)


class SGD:
    """Stochastic gradient descent with momentum, weight decay and Nesterov's variant (as ``torch.optim.SGD``)."""

    def __init__(self, spec: OptimizerSpec, named: dict[str, torch.nn.Parameter]) -> None:
        arguments = dict(spec.arguments)
        self.lr = spec.lr
        self._momentum = _number(arguments, "momentum")
        self._dampening = _number(arguments, "dampening")
        self._weight_decay = _number(arguments, "weight_decay")
        self._nesterov = bool(arguments.get("nesterov", False))
        if self._nesterov and (self._momentum <= 0 or self._dampening != 0):
            raise UserError("training.optimizer.nesterov: needs a momentum above 0 and no dampening")
        self._names = list(named)
        # Detached: in-place changes of them need no guard against autograd.
        self._parameters = [parameter.detach() for parameter in named.values()]
        self._momenta: list[torch.Tensor | None] = [None] * len(self._names)

    def step(self, gradients: Sequence[torch.Tensor | None]) -> None:
        """Change the parameters by one step."""
        if any(gradient is None for gradient in gradients):
            reached = [index for index, gradient in enumerate(gradients) if gradient is not None]
            parameters = [self._parameters[index] for index in reached]
            steps = [gradient for gradient in gradients if gradient is not None]
        else:
            reached, parameters = list(range(len(self._parameters))), self._parameters
            steps = cast("list[torch.Tensor]", list(gradients))
        if not steps:
            return
        if self._weight_decay:
            steps = list(torch._foreach_add(steps, parameters, alpha=self._weight_decay))
        if self._momentum:
            steps = self._with_momentum(reached, steps)
        torch._foreach_add_(parameters, steps, alpha=-self.lr)

    def _with_momentum(self, reached: list[int], steps: list[torch.Tensor]) -> list[torch.Tensor]:
        moving = [
            (momentum, step)
            for index, step in zip(reached, steps, strict=True)
            if (momentum := self._momenta[index]) is not None
        ]
        if moving:
            momenta, fresh = [pair[0] for pair in moving], [pair[1] for pair in moving]
            torch._foreach_mul_(momenta, self._momentum)
            torch._foreach_add_(momenta, fresh, alpha=1 - self._dampening)
        directions: list[torch.Tensor] = []
        for index, step in zip(reached, steps, strict=True):
            momentum = self._momenta[index]
            if momentum is None:  # the first gradient is the momentum, undampened
                momentum = self._momenta[index] = step.clone()
            directions.append(momentum)
        return list(torch._foreach_add(steps, directions, alpha=self._momentum)) if self._nesterov else directions

    def dump(self) -> StageState:
        """Return the momentum of every parameter that has one, and the learning rate."""
        tensors = {
            f"{PREFIX}{name}.momentum_buffer": to_array(momentum)
            for name, momentum in zip(self._names, self._momenta, strict=True)
            if momentum is not None
        }
        return StageState(tensors, {GROUPS: [{"lr": self.lr}]})

    def restore(self, state: StageState) -> None:
        """Take over momentum and learning rate."""
        for index, (name, parameter) in enumerate(zip(self._names, self._parameters, strict=True)):
            array = state.tensors.get(f"{PREFIX}{name}.momentum_buffer")
            if array is not None:
                self._momenta[index] = torch.empty_like(parameter).copy_(torch.tensor(array))
        self.lr = cast("float", _groups(state)[0]["lr"])


class TorchOptimizer:
    """A class of ``torch.optim`` behind our interface."""

    def __init__(self, spec: OptimizerSpec, named: dict[str, torch.nn.Parameter]) -> None:
        self._spec_name = spec.name
        self._names = list(named)
        self._parameters = list(named.values())
        kind = _torch_class(spec.name)
        arguments: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in spec.arguments.items()
        }
        try:
            self.inner: TorchClass = kind(self._parameters, lr=spec.lr, **arguments)  # type: ignore[call-arg]
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"training.optimizer: {spec.name} refused its arguments: {error}") from error
        if len(self.inner.param_groups) != 1:
            raise UserError(f"training.optimizer.name: {spec.name} with several groups is not supported yet")

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return float(self.inner.param_groups[0]["lr"])

    @lr.setter
    def lr(self, value: float) -> None:
        self.inner.param_groups[0]["lr"] = value

    def step(self, gradients: Sequence[torch.Tensor | None]) -> None:
        """Change the parameters by one step."""
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        try:
            self.inner.step()
        except TypeError as error:  # LBFGS and its kind evaluate the loss themselves
            raise UserError(
                f"training.optimizer.name: {self._spec_name} can't make a step from gradients alone ({error}); "
                "it is not supported yet",
                hint="Use sgd, adam, adamw or another first-order class of torch.optim.",
            ) from error

    def dump(self) -> StageState:
        """Return what torch's ``state_dict`` holds."""
        content = self.inner.state_dict()
        state = StageState()
        for index, slots in content["state"].items():
            for slot, value in slots.items():
                name = f"{PREFIX}{self._names[index]}.{slot}"
                if isinstance(value, torch.Tensor):
                    state.tensors[name] = to_array(value)
                else:
                    state.scalars[name] = self._plain(slot, value)
        state.scalars[GROUPS] = [
            {key: self._plain(key, value) for key, value in group.items() if key != "params"}
            for group in content["param_groups"]
        ]
        return state

    def restore(self, state: StageState) -> None:
        """Give torch's ``load_state_dict`` what :meth:`dump` took from it."""
        content = self.inner.state_dict()
        slots: dict[int, dict[str, Any]] = {}
        for index, slot, value in self._slots(state):
            slots.setdefault(index, {})[slot] = value
        groups: list[dict[str, Any]] = []
        for group, held in zip(content["param_groups"], _groups(state), strict=True):
            lists = {key for key, value in group.items() if isinstance(value, list)}
            plain = {key: tuple(v) if isinstance(v, list) and key not in lists else v for key, v in held.items()}
            groups.append({**group, **plain})
        self.inner.load_state_dict({"state": slots, "param_groups": groups})

    def _slots(self, state: StageState) -> Iterator[tuple[int, str, Any]]:
        places = {name: index for index, name in enumerate(self._names)}
        held: dict[str, Array | JSON] = {**state.tensors, **state.scalars}
        for name in sorted(held):
            if name.startswith(PREFIX) and name != GROUPS:
                parameter, _, slot = name.removeprefix(PREFIX).rpartition(".")
                value = held[name]
                yield places[parameter], slot, torch.tensor(value) if name in state.tensors else value

    def _plain(self, name: str, value: object) -> JSON:
        if isinstance(value, tuple | list):
            return [self._plain(name, item) for item in value]
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise UserError(
            f"training.optimizer.name: {self._spec_name} keeps {name!r} as {type(value).__name__}; a state of anything "
            "but tensors and numbers is not supported yet",
            hint="Use sgd, adam, adamw or another first-order class of torch.optim.",
        )


def _torch_class(name: str) -> type[TorchClass]:
    from torch.optim import Optimizer as Base  # slow, and plain SGD doesn't need it

    module_name, _, class_name = TORCH_NAMES.get(name, name).rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"training.optimizer.name: there is no {name}", hint="See torch.optim for what is.") from error
    if not (isinstance(found, type) and issubclass(found, Base)) or found is Base:
        raise UserError(f"training.optimizer.name: {name} is not an optimiser")
    return found


def _number(arguments: dict[str, Any], name: str) -> float:
    value = arguments.get(name, 0.0)
    if isinstance(value, bool) or not isinstance(value, int | float) or (value < 0 and name != "dampening"):
        raise UserError(f"training.optimizer.{name}: expected a number of at least 0, got {value!r}")
    return float(value)


def _groups(state: StageState) -> list[dict[str, JSON]]:
    return cast("list[dict[str, JSON]]", state.scalars[GROUPS])
