"""The rows of a shard on the device, and how a batch of them is cut.

Rows are flat float32 and contiguous: one gather makes a batch. Memory comes from torch's own allocator, whose
alignment is fixed; that of an array from elsewhere is not, and it can move the last bit of a matrix product.

Shape suffixes: N records, D elements of a row, B batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sisa.learners.columns import Columns
from sisa.learners.models import wants_channels_last
from sisa.learners.preprocess import Preprocessor
from sisa.recipe import Recipe


@dataclass
class Resident:
    """Rows that a model is fed from."""

    rows_ND: torch.Tensor
    feature_shape: tuple[int, ...]
    channels_last: bool
    """Rows of images are (height, width, channels) and batches stay so in memory."""

    @classmethod
    def of(cls, columns: Columns, preprocessor: Preprocessor, *, recipe: Recipe, device: torch.device) -> Resident:
        """Preprocess records and put them on ``device``."""
        rows_ND = torch.zeros((columns.count, sum(preprocessor.widths)))
        preprocessor.transform(columns, out_ND=rows_ND.numpy())
        return cls.place(rows_ND, recipe=recipe, feature_shape=preprocessor.feature_shape, device=device)

    @classmethod
    def place(
        cls, rows_ND: torch.Tensor, *, recipe: Recipe, feature_shape: tuple[int, ...], device: torch.device
    ) -> Resident:
        """Put preprocessed rows (images channels last) on ``device``."""
        rows_ND = rows_ND.to(device)
        channels_last = wants_channels_last(recipe)
        if len(feature_shape) == 3 and not channels_last:
            channels, height, width = feature_shape
            images = rows_ND.view(-1, height, width, channels).permute(0, 3, 1, 2)
            rows_ND = images.reshape(len(rows_ND), channels * height * width).contiguous()
        return cls(rows_ND, feature_shape, channels_last)

    def batch(self, rows_B: torch.Tensor) -> torch.Tensor:
        """Gather rows by index: (B, D), or (B, channels, height, width)."""
        return self._shaped(self.rows_ND.index_select(0, rows_B))

    def all(self) -> torch.Tensor:
        """Return all rows as one batch, without a copy."""
        return self._shaped(self.rows_ND)

    def _shaped(self, batch_BD: torch.Tensor) -> torch.Tensor:
        if len(self.feature_shape) == 1:
            return batch_BD
        if not self.channels_last:
            return batch_BD.view(-1, *self.feature_shape)
        channels, height, width = self.feature_shape
        return batch_BD.view(-1, height, width, channels).permute(0, 3, 1, 2)
