"""By when the law wants a deletion carried out, counted from its receipt.

Holidays differ by place and only ever extend a deadline: they are not counted, so that a date here is never too late.
"""

from __future__ import annotations

import calendar
from datetime import datetime, timedelta

from sisa.errors import UserError

REGIMES = ("", "gdpr", "ccpa")
"""No clock; one month (GDPR, Article 12(3)); 45 days (CCPA regulations, section 7021)."""


def due_at(received: datetime, regime: str) -> datetime | None:
    """Return the end of the time limit; None without a regime.

    A month ends on the same day of the next one, or on its last day (Regulation 1182/71, Article 3(2)(c)).

    >>> due_at(datetime(2026, 1, 31), "gdpr"), due_at(datetime(2026, 1, 31), "ccpa")
    (datetime.datetime(2026, 2, 28, 0, 0), datetime.datetime(2026, 3, 17, 0, 0))
    """
    if regime == "gdpr":
        year, month = received.year + received.month // 12, received.month % 12 + 1
        return received.replace(year=year, month=month, day=min(received.day, calendar.monthrange(year, month)[1]))
    return received + timedelta(days=45) if regime == "ccpa" else None


def check_regime(regime: str) -> None:
    """Make sure that a regime is known.

    Raises:
        UserError: It isn't.
    """
    if regime not in REGIMES:
        raise UserError(
            f"regime: expected {' or '.join(r for r in REGIMES if r)}", hint="Leave it out if no clock runs."
        )
