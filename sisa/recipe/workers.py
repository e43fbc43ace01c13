"""What one shard's training gets, as far as it determines bits."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

MOST_DEVICES = 64


class WorkersSpec(BaseModel):
    """How a shard is trained."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    devices_per_shard: int = Field(default=1, ge=1, le=MOST_DEVICES)
    """Processes that train one shard together, each on a device of its own and on its part of every batch. Another
    number gives other bits, so more than one belongs to the recipe's identity."""
