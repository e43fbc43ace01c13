"""How checks say what they found: one line for each problem, which names a place and never a person."""

from __future__ import annotations

from collections.abc import Callable

from sisa.errors import SisaError
from sisa.layout import HOLDOUT_SLICE

UNCHECKABLE = (ValueError, TypeError, LookupError, ArithmeticError, MemoryError, RecursionError)
"""What a value that nobody wrote there may lead to, where no check foresaw it. The value itself is never told."""


def guarded(check: Callable[[], list[str]], what: str) -> list[str]:
    """Run a check of ``what``; an error of ours, or a file that can't be read (any more), is what it found."""
    try:
        return check()
    except SisaError as error:
        return [error.message]
    except OSError as error:
        return [f"{error.filename}: {error.strerror}"]
    except UNCHECKABLE as error:
        return [f"{what}: can't be checked: {type(error).__name__}"]


def slice_name(shard: int, slice_: int) -> str:
    """Say where rows lie."""
    if slice_ < HOLDOUT_SLICE:
        return f"shard {shard}, holdout of generation {-slice_}"
    return f"shard {shard}, holdout" if slice_ == HOLDOUT_SLICE else f"shard {shard}, slice {slice_}"


def stage_name(shard: int, stage: int) -> str:
    """Say which stage is meant."""
    return f"shard {shard}, stage {stage}"
