"""How fast work goes and how long it will take: the numbers behind a bar or a line. Pure, but for the clock it is given."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

WINDOW_S = 30.0
"""The rate is that of the last so many seconds: it follows a machine that joins or leaves."""
SAMPLE_EVERY_S = 0.5


class Pace:
    """One piece of work: its units done, its stages, its rate."""

    def __init__(self, what: str, total: int | None, *, clock: Callable[[], float] | None = None) -> None:
        self.what = what
        self.total = total or 0
        self.stages: tuple[int, int] | None = None
        """How many are made, of how many; None for work without stages."""
        self._clock = clock or time.monotonic
        self.started = self._clock()
        self._worked = 0
        self._found = 0
        self._samples = deque([(self.started, 0)])

    def advance(self, amount: int) -> None:
        """Count units that were worked off."""
        self._worked += amount
        now = self._clock()
        if now - self._samples[-1][0] >= SAMPLE_EVERY_S:
            self._samples.append((now, self._worked))
            while len(self._samples) > 2 and now - self._samples[1][0] > WINDOW_S:
                self._samples.popleft()

    def found(self, amount: int) -> None:
        """Count units that needn't be worked off, or, below 0, have to be once more: they say nothing of the rate."""
        self._found += amount

    @property
    def done(self) -> int:
        """Units that are done, wherever they come from."""
        return min(self._worked + self._found, self.total) if self.total else self._worked

    @property
    def seconds(self) -> float:
        """How long it has taken."""
        return self._clock() - self.started

    @property
    def rate(self) -> float:
        """Units a second; 0 while nothing is known."""
        since, before = self._samples[0]
        elapsed = self._clock() - since
        return (self._worked - before) / elapsed if elapsed > 0 else 0.0

    def parts(self) -> list[str]:
        """Return what is to be told, each part by itself."""
        found = [f"{100 * self.done // self.total} %"] if self.total else []
        if self.stages is not None:
            found.append(f"{self.stages[0]:,}/{self.stages[1]:,} stages")
            found.append(f"{short(self._worked)} record-epochs")
            unit = " records/s"
        else:
            found += [] if self.total else [f"{self._worked:,}"]
            unit = "/s"
        rate = self.rate
        if self._worked and rate > 0:
            found.append(f"{short(rate)}{unit}")
            if self.total:
                found.append(f"{duration((self.total - self.done) / rate)} left")
        return found


def short(number: float) -> str:
    """Return a number in few digits.

    >>> [short(number) for number in (0, 7, 950, 12_345, 999_999, 4.56e6, 7.8e9)]
    ['0', '7', '950', '12.3k', '1.00M', '4.56M', '7.80G']
    """
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        scaled = number / size
        if scaled >= 0.99995:
            digits = 2 if scaled < 9.995 else 1 if scaled < 99.95 else 0
            return f"{scaled:.{digits}f}{letter}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    """Return a length of time for people.

    >>> [duration(seconds) for seconds in (0.4, 59.6, 61, 3_600, 90_061)]
    ['0:00', '1:00', '1:01', '1:00:00', '25:01:01']
    """
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
