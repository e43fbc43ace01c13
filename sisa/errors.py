"""The two roots of everything that can go wrong, and their exit codes.

``UserError`` is what the caller can fix (exit code 2); ``StoreError`` is what the store got wrong or
somebody else holds (exit code 3). A message says what was expected and what came; a hint says what to
do next. No message carries a personal value other than an id that the caller typed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar


class SisaError(Exception):
    """Base of all errors that this package raises on purpose."""

    exit_code: ClassVar[int] = 3

    def __init__(self, message: str, *, hint: str = "", without_ids: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.without_ids = without_ids or message
        """The message for logs that others read: nobody's id is in it."""

    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross process borders (workers raise them), and keyword-only arguments would be lost.
        return (_rebuild, (type(self), self.message, self.hint, self.__dict__))


def _rebuild(kind: type[SisaError], message: str, hint: str, state: dict[str, object]) -> SisaError:
    error = kind.__new__(kind)
    SisaError.__init__(error, message, hint=hint)
    error.__dict__.update(state)
    return error


class UserError(SisaError):
    """The caller can fix this: a wrong field, path, id or argument."""

    exit_code: ClassVar[int] = 2


class RecipeError(UserError):
    """One or more fields of a recipe are wrong; every problem is listed."""

    def __init__(self, problems: Sequence[str], *, source: str = "the recipe", hint: str = "") -> None:
        count = len(problems)
        head = f"{source} has {count} problem{'s' if count != 1 else ''}:"
        super().__init__("\n".join([head, *(f"  - {problem}" for problem in problems)]), hint=hint)
        self.problems = list(problems)


class SourceError(UserError):
    """The table of records can't be used as it is; nothing was written."""


class UnknownIdsError(UserError):
    """Ids were asked for that the store doesn't hold; nothing was changed."""

    def __init__(self, message: str, *, missing: Sequence[str], hint: str = "") -> None:
        count = len(missing)
        noun = "id is" if count == 1 else "ids are"
        super().__init__(message, hint=hint, without_ids=f"{count} {noun} not in the store; nothing was changed")
        self.missing = list(missing)


class NoScoreError(UserError):
    """What the ensemble computes for a row is no number: there is nothing to answer, and nothing is guessed."""

    def __init__(self, row: int) -> None:
        super().__init__(
            f"rows[{row}]: the ensemble's scores for it are no numbers",
            hint="Its values are too large to compute with; or, if every row is refused, the training has diverged.",
        )
        self.row = row

    def after(self, rows: int) -> NoScoreError:
        """Return the error as who has given out ``rows`` rows before tells it."""
        return NoScoreError(self.row + rows)


class FootingError(UserError):
    """Code, model source or platform differ from those the store was trained with."""


class StoreError(SisaError):
    """The store is damaged, or another operation holds it."""


class DamagedError(StoreError):
    """Bytes in the store are missing, changed or not what the ledger says they are.

    ``place`` is where, for who works on the store's machine. It may hold a lineage key: it is no part of the message,
    which servers pass on and logs keep.
    """

    def __init__(self, message: str, *, hint: str = "", place: str = "") -> None:
        super().__init__(message, hint=hint)
        self.place = place


class BusyError(StoreError):
    """Another operation holds the store."""


class LostError(StoreError):
    """A server that the store needs can't be reached, or the connection to it was lost."""


class LostLockError(StoreError):
    """A lock was lost while its holder worked: somebody else may hold it by now."""


class StaleError(StoreError):
    """The records changed while something was computed from them; compute it again."""


class NoConstituentError(StoreError):
    """No clean constituent is left to answer with."""
