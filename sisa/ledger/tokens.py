"""Bearer tokens of the aggregator: who may ask it for what. A token's secret is shown once and kept by nobody here.

A token reads ``sisa_<id>_<secret>``. The id is public: it names the token in lists and in logs. The secret is 256
random bits, and of the whole text the ledger holds a SHA-256. A salted or slow hash would add nothing: those make
guessing dear where there is something to guess, and nobody guesses 256 bits.
"""

from __future__ import annotations

import difflib
import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from sisa.errors import BusyError, UserError
from sisa.ledger.database import BUSY_TIMEOUT_S, Database, Row, now

Scope = Literal["predict", "delete", "read", "admin"]
SCOPES: tuple[str, ...] = get_args(Scope)
"""What a token may be for; ``admin`` is for everything."""

ID = re.compile(r"[0-9a-f]{16}")
TEXT = re.compile(r"sisa_([0-9a-f]{16})_[A-Za-z0-9_-]{43}")
SECRET_BYTES = 32
REMEMBERED = 1_000
"""Rows that are kept between two commits of others, those of ids that nobody has included."""
NOBODY = bytes(hashlib.sha256().digest_size)
"""Compared with where no token has the id, so that both ways take the same time. No text has this digest."""


@dataclass(frozen=True)
class Token:
    """One token, without its secret."""

    id: str
    scopes: tuple[str, ...]
    name: str
    created_at: str
    last_used_on: str | None
    """The day (UTC) on which it last opened a door; None if it never did."""

    def allows(self, scope: Scope) -> bool:
        """Say whether the token is good for ``scope``."""
        return scope in self.scopes or "admin" in self.scopes

    @property
    def used_today(self) -> bool:
        """Whether today's use is remembered."""
        return self.last_used_on == now()[:10]


_Row = tuple[Token, bytes]
"""A token, and the digest of its text."""


class Tokens:
    """The table of tokens."""

    def __init__(self, database: Database) -> None:
        self._db = database
        self._rows: dict[str, _Row | None] = {}
        self._counted = -1
        self._patient = True

    def create(self, scopes: Iterable[str], *, name: str = "") -> tuple[str, Token]:
        """Make a token; return its text, which can't be had again, and what is remembered of it.

        Raises:
            UserError: A scope is unknown, none is given, or the name can't be printed.
        """
        wanted = _known(scopes)
        if not name.isprintable():
            raise UserError("the token's name: expected printable text", hint="Give one line of plain text.")
        identifier = secrets.token_hex(8)
        text = f"sisa_{identifier}_{secrets.token_urlsafe(SECRET_BYTES)}"
        token = Token(identifier, wanted, name, now(), None)
        with self._db.transaction():
            self._db.rows(
                "INSERT INTO tokens VALUES (?, ?, ?, ?, ?, NULL)",
                (identifier, _digest(text), ",".join(wanted), name, token.created_at),
            )
            self._db.note("token_created", token=identifier, scopes=list(wanted))
        return text, token

    def find(self, text: str, *, wait: bool = True) -> Token | None:
        """Return the token that ``text`` is, or None: it was never made, or it was revoked.

        Args:
            text: What somebody presents.
            wait: Whether to wait while another process commits; an event loop had better not.

        Raises:
            BusyError: The ledger is being committed to, or lies on a server that has to be asked, and ``wait`` is
                false. The connection stays so until it is asked to wait again: keep one for the event loop, and
                nothing else.
        """
        form = TEXT.fullmatch(text)
        if form is None:
            return None
        if self._db.remote and not wait:
            raise BusyError("the ledger has to be asked over the network")
        self._wait(patiently=wait)
        row = self._row(form[1]) if wait else self._row_at_once(form[1])
        right = hmac.compare_digest(_digest(text), row[1] if row is not None else NOBODY)
        return row[0] if row is not None and right else None

    def _row(self, identifier: str) -> _Row | None:
        row = self._db.row("SELECT * FROM tokens WHERE id = ?", (identifier,))
        return (_token(row), bytes(row["digest"])) if row is not None else None

    def _row_at_once(self, identifier: str) -> _Row | None:
        """Return a row, remembered while no other connection has committed."""
        counted = self._db.commits()
        if counted != self._counted or len(self._rows) >= REMEMBERED:
            self._rows.clear()
            self._counted = counted
        if identifier not in self._rows:
            self._rows[identifier] = self._row(identifier)
        return self._rows[identifier]

    def _wait(self, *, patiently: bool) -> None:
        """Have this connection wait for others' commits, or not."""
        if self._patient != patiently:
            self._db.be_patient(BUSY_TIMEOUT_S if patiently else 0)
            self._patient = patiently

    def all(self) -> list[Token]:
        """Return every token that wasn't revoked, oldest first."""
        return [_token(row) for row in self._db.rows("SELECT * FROM tokens ORDER BY created_at, id")]

    def revoke(self, identifier: str) -> Token:
        """Remove a token: the next request that carries it is refused, whichever process it reaches.

        Args:
            identifier: Its id; or its whole text, which is what somebody has who finds a token that leaked.

        Raises:
            UserError: There is no such token.
        """
        form = TEXT.fullmatch(identifier)
        wanted = form[1] if form is not None else identifier
        if not ID.fullmatch(wanted):  # not repeated in the message: it may be a part of a token
            raise UserError("expected a token's id, 16 hex digits", hint="`sisa token list` shows the ids.")
        with self._db.transaction():
            row = self._row(wanted)
            if row is None:
                raise UserError(f"token {wanted}: the store has no such token", hint="`sisa token list` shows the ids.")
            self._db.rows("DELETE FROM tokens WHERE id = ?", (wanted,))
            self._rows.clear()
            self._db.note("token_revoked", token=wanted)
        self._db.shed("tokens")
        return row[0]

    def used(self, token: Token) -> None:
        """Remember that a token was used today; only the first use of a day writes."""
        if not token.used_today:
            with self._db.transaction():
                self._db.rows("UPDATE tokens SET last_used_on = ? WHERE id = ?", (now()[:10], token.id))
                self._rows.clear()


def _known(scopes: Iterable[str]) -> tuple[str, ...]:
    """Return scopes in the usual order, each once."""
    wanted = set(scopes)
    for scope in sorted(wanted - set(SCOPES)):
        near = difflib.get_close_matches(scope, SCOPES, n=1, cutoff=0.5)
        meant = f" (did you mean {near[0]!r}?)" if near else ""
        raise UserError(
            f"scope {scope!r}: expected predict, delete, read or admin{meant}", hint="For example: --scope predict,read"
        )
    if not wanted:
        raise UserError("expected at least one scope: predict, delete, read or admin", hint="For example: --scope read")
    return tuple(scope for scope in SCOPES if scope in wanted)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _token(row: Row) -> Token:
    return Token(row["id"], tuple(row["scopes"].split(",")), row["name"], row["created_at"], row["last_used_on"])
