"""What a PostgreSQL driver's errors mean for a ledger. No value of a statement, and no secret, is repeated."""

from __future__ import annotations

import psycopg
from psycopg import errors

from sisa.errors import BusyError, DamagedError, LostError, StoreError, UserError
from sisa.ledger.place import PostgresPlace

RECONNECT = (
    "Run the command again when the database answers: what was committed is there, and every step can be repeated."
)
PRIMARY = "Point the URL at the primary (target_session_attrs=read-write picks it from several hosts)."
_LOST = ("08", "57P01", "57P02", "57P03", "57P05", "25P03")
"""Classes and codes of a connection that is gone: broken, shut down, crashed, or ended for idling."""


def unreachable(place: PostgresPlace, error: psycopg.Error) -> StoreError:
    """Say that a server can't be reached, and why in its own words; they hold no secret."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return LostError(
        f"the ledger at {place.shown} can't be reached: {reason}",
        hint="Check that the server runs and lets this account in (PGPASSFILE, PGPASSWORD, pg_hba.conf), then try again.",
    )


def failure(place: PostgresPlace, error: psycopg.Error, *, broken: bool) -> StoreError | UserError:
    """Say in our words what went wrong. No value of a statement is repeated."""
    code, where = error.sqlstate or "", f"the ledger at {place.shown}"
    if broken or code.startswith(_LOST) or isinstance(error, errors._WaitTimeout):
        return LostError(f"{where}: the connection was lost", hint=RECONNECT)
    if isinstance(error, psycopg.DataError) and "NUL" in str(error):
        return UserError("a text has a NUL character, which can't be kept", hint="Leave it out.")
    for codes, kind, reason, hint in _FAILURES:
        if code.startswith(codes):
            return kind(f"{where} {reason}", hint=hint)
    return StoreError(f"{where} refused a statement ({type(error).__name__} {code})", hint=RECONNECT)


_FAILURES: tuple[tuple[tuple[str, ...], type[StoreError], str, str], ...] = (
    (("55P03", "40P01", "40001"), BusyError, "was held by others for too long", "Run the command again."),
    (("57014",), BusyError, "didn't answer in time", "Run the command again; look at the server's load."),
    (
        ("25006",),
        StoreError,
        "is read-only: a standby, or a server that was told to take no writes; nothing was changed",
        PRIMARY,
    ),
    (
        ("53",),
        StoreError,
        "is out of room, memory or connections; nothing was changed",
        "Make room, or end sessions, then run the command again.",
    ),
    (
        ("42501",),
        StoreError,
        "doesn't let this account do what is needed",
        "See the rights that a ledger needs in the documentation (Operations).",
    ),
    (
        ("42P01", "42703", "3F000", "XX001", "XX002"),
        DamagedError,
        "is missing, damaged or not one",
        "Restore the database from a backup of it.",
    ),
)
"""SQLSTATE codes, or how they begin, and what they mean for a ledger."""
