"""Whether two modules differ in nothing but the values of their parameters and buffers.

Only then may one of them be evaluated with the parameters of the other. A factory may draw a constant that it keeps in
an attribute, or in the variables around a function that it defines: whatever can't be compared counts as different.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import CellType, FunctionType

import numpy as np
import torch
from torch import nn

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, slice, range)
STATE = frozenset({"_parameters", "_buffers", "_modules"})
OF_A_CLASS = frozenset({"__dict__", "__weakref__", "__doc__", "__module__", "__qualname__", "__static_attributes__"})


def alike(one: nn.Module, other: nn.Module) -> bool:
    """Say whether ``other`` is ``one`` with other values in its parameters and buffers."""
    return _modules(one, other, set())


def _same(one: object, other: object, seen: set[tuple[int, int]]) -> bool:
    if one is other or (id(one), id(other)) in seen:
        return True
    seen.add((id(one), id(other)))  # an object that holds itself is the same as far as the rest is
    if isinstance(one, type) and isinstance(other, type):
        return _classes(one, other, seen)
    if not _same(type(one), type(other), seen):
        return False
    if isinstance(one, nn.Module) and isinstance(other, nn.Module):
        return _modules(one, other, seen)
    if isinstance(one, FunctionType) and isinstance(other, FunctionType):
        return _functions(one, other, seen)
    return _values(one, other, seen)


def _values(one: object, other: object, seen: set[tuple[int, int]]) -> bool:
    if isinstance(one, CellType) and isinstance(other, CellType):
        return _same(one.cell_contents, other.cell_contents, seen)
    if isinstance(one, PLAIN):
        return bool(one == other)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(_same(a, b, seen) for a, b in zip(one, other, strict=True))
    if isinstance(one, set | frozenset) and isinstance(other, set | frozenset):
        return one == other and all(isinstance(entry, PLAIN) for entry in one)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return list(one) == list(other) and all(_same(one[name], other[name], seen) for name in one)
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return one.dtype == other.dtype and one.dtype != object and np.array_equal(one, other)
    return False


def _modules(one: nn.Module, other: nn.Module, seen: set[tuple[int, int]]) -> bool:
    if not _same(type(one), type(other), seen) or vars(one).keys() != vars(other).keys():
        return False
    for tensors in ("_parameters", "_buffers"):
        if _shapes(vars(one)[tensors]) != _shapes(vars(other)[tensors]):
            return False
    children, others = vars(one)["_modules"], vars(other)["_modules"]
    return (
        list(children) == list(others)
        and all(_same(child, others[name], seen) for name, child in children.items())
        and all(_same(value, vars(other)[name], seen) for name, value in vars(one).items() if name not in STATE)
    )


def _shapes(tensors: Mapping[str, torch.Tensor | None]) -> dict[str, object]:
    return {n: None if t is None else (type(t), t.shape, t.dtype, t.device) for n, t in tensors.items()}


def _functions(one: FunctionType, other: FunctionType, seen: set[tuple[int, int]]) -> bool:
    return (
        one.__code__ == other.__code__
        and one.__globals__ is other.__globals__
        and all(
            _same(getattr(one, part), getattr(other, part), seen)
            for part in ("__defaults__", "__kwdefaults__", "__closure__", "__dict__")
        )
    )


def _classes(one: type, other: type, seen: set[tuple[int, int]]) -> bool:
    """A class that a factory defines is made anew by every call."""
    if (one.__module__, one.__qualname__) != (other.__module__, other.__qualname__):
        return False
    mine, theirs = ({n: v for n, v in vars(c).items() if n not in OF_A_CLASS} for c in (one, other))
    return (
        len(one.__bases__) == len(other.__bases__)
        and all(_same(a, b, seen) for a, b in zip(one.__bases__, other.__bases__, strict=True))
        and mine.keys() == theirs.keys()
        and all(_same(value, theirs[name], seen) for name, value in mine.items())
    )
