"""How checks say what they found: one line for each problem, which names a place and never a person."""

from __future__ import annotations

from collections.abc import Callable

from sisa.errors import SisaError
from sisa.layout import HOLDOUT_SLICE


def guarded(check: Callable[[], list[str]]) -> list[str]:
    """Run a check; an error of ours, or a file that can't be read (any more), is what it found."""
    try:
        return check()
    except SisaError as error:
        return [error.message]
    except OSError as error:
        return [f"{error.filename}: {error.strerror}"]


def slice_name(shard: int, slice_: int) -> str:
    """Say where rows lie."""
    return f"shard {shard}, holdout" if slice_ == HOLDOUT_SLICE else f"shard {shard}, slice {slice_}"


def stage_name(shard: int, stage: int) -> str:
    """Say which stage is meant."""
    return f"shard {shard}, stage {stage}"
