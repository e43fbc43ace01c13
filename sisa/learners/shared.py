"""Gradients of a batch of which several processes hold a part each.

Every process sees the same batches in the same order and takes its fixed part of each. What the parts give, weighted
by their sizes, is passed around as it is and summed by every process itself, in the order of the processes: so all of
them have the same bits, on any network and with any way of passing it around.

Shape suffixes: B batch, F all parameters in a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sisa.errors import UserError
from sisa.learners.gradients import Gradients

ALONE = "Set workers.devices_per_shard: 1, or use a normalisation without running statistics, such as GroupNorm."


class Exchange(Protocol):
    """A process among those that train one shard."""

    rank: int
    size: int

    def gather(self, mine: torch.Tensor) -> Sequence[torch.Tensor]:
        """Return what each process gave, in their order."""


def part_of(count: int, *, rank: int, size: int) -> slice:
    """Return the part of a batch that a process takes: parts are contiguous and differ by one record at most.

    >>> [part_of(7, rank=rank, size=3) for rank in range(3)]
    [slice(0, 3, None), slice(3, 5, None), slice(5, 7, None)]
    """
    each, more = divmod(count, size)
    start = rank * each + min(rank, more)
    return slice(start, start + each + (rank < more))


def require_shareable(module: nn.Module) -> None:
    """Refuse a model that learns from whole batches.

    Raises:
        UserError: It normalises by the batch.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, _BatchNorm):
            raise UserError(
                f"workers.devices_per_shard: the model's layer {name!r} is BatchNorm, whose statistics would be those of "
                "a part of each batch; it is not supported yet with several processes",
                hint=ALONE,
            )


class SharedGradients:
    """Gradients of the mean loss of a batch, from those of its parts."""

    def __init__(self, inner: Gradients, parameters: Sequence[nn.Parameter], exchange: Exchange) -> None:
        self._inner = inner
        self._exchange = exchange
        self._parameters = list(parameters)
        sizes = [parameter.numel() for parameter in parameters]
        wide = any(parameter.dtype == torch.float64 for parameter in parameters)
        dtype, device = (torch.float64 if wide else torch.float32), self._parameters[0].device
        # Behind the gradients, one number each that says whether the loss depends on the parameter at all.
        self._mine_F = torch.zeros(sum(sizes) + len(sizes), dtype=dtype, device=device)
        *parts, self._reached = torch.split(self._mine_F, [*sizes, len(sizes)])
        self._mine = [part.view(p.shape) for part, p in zip(parts, self._parameters, strict=True)]
        self._sizes = sizes

    def __call__(self, rows_B: torch.Tensor, labels_B: torch.Tensor) -> Sequence[torch.Tensor | None]:
        """Return one gradient per trainable parameter."""
        part = part_of(len(rows_B), rank=self._exchange.rank, size=self._exchange.size)
        self._mine_F.zero_()
        if part.stop > part.start:  # a last batch may have fewer records than there are processes
            weight = (part.stop - part.start) / len(rows_B)
            for index, gradient in enumerate(self._inner(rows_B[part], labels_B[part])):
                if gradient is not None:
                    self._mine[index].copy_(gradient).mul_(weight)
                    self._reached[index] = 1.0
        total_F, *others = self._exchange.gather(self._mine_F)
        for other_F in others:
            total_F = total_F + other_F
        return self._split(total_F)

    def _split(self, total_F: torch.Tensor) -> list[torch.Tensor | None]:
        *parts, reached = torch.split(total_F, [*self._sizes, len(self._sizes)])
        return [
            part.view(parameter.shape).to(parameter.dtype) if count else None
            for part, parameter, count in zip(parts, self._parameters, reached.tolist(), strict=True)
        ]

    def loss(self) -> float:
        """Return the loss of this process's part of the last batch."""
        return self._inner.loss()
