"""The clock that leases are counted on."""

from __future__ import annotations

import time


def elapsed_s() -> float:
    """Return seconds since some moment, on a clock that neither jumps nor stops while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
