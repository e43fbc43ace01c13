"""Where a ledger lies: a SQLite file, or a schema of a PostgreSQL database. The one place that reads the field.

A database is named by a URL, the schema by its fragment: ``postgresql://host/sisa#sisa_0f3c...``. The fragment is
made with the store and kept in its frozen recipe, so that many stores share one database. A URL never holds a secret:
it is copied into the store, shown in messages and sent to workers.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit, urlunsplit

from sisa.errors import UserError

SCHEMES = ("postgresql", "postgres")
SCHEMA = re.compile(r"sisa_[0-9a-f]{32}")
PARAMETERS = frozenset(
    {
        "channel_binding", "dbname", "gssencmode", "host", "hostaddr", "krbsrvname", "load_balance_hosts", "passfile",
        "port", "require_auth", "service", "sslcert", "sslcrl", "sslkey", "sslmode", "sslrootcert",
        "target_session_attrs", "user",
    }
)  # fmt: skip
"""What a URL may say of a connection. Not ``password``; and not ``options``, with which durability could be undone."""
SECRETS = "Give it by PGPASSFILE (~/.pgpass), a service file or PGPASSWORD: a URL is copied into the store."


@dataclass(frozen=True)
class PostgresPlace:
    """A schema of a PostgreSQL database."""

    url: str
    """Without the schema, in the words of its writer."""
    schema: str = ""
    """Empty before the store is made."""

    @property
    def text(self) -> str:
        """What a frozen recipe keeps, and what a worker is told."""
        return f"{self.url}#{self.schema}" if self.schema else self.url

    @property
    def shown(self) -> str:
        """For messages: the server and the database, no parameters."""
        parts = urlsplit(self.url)
        return urlunsplit((SCHEMES[0], parts.netloc, parts.path, "", ""))

    def of(self, schema: str) -> PostgresPlace:
        """Return the place of one store's schema in this database."""
        return PostgresPlace(self.url, schema)


Place = Path | PostgresPlace


def is_postgres(text: str) -> bool:
    """Say whether a text names a database on a server."""
    return text.partition("://")[0] in SCHEMES and "://" in text


def place_of(text: str | None, default: Path) -> Place:
    """Read the recipe's field ``ledger``.

    Args:
        text: What it says; None if it says nothing.
        default: The file in the store; or the one that the text names, for a store in object storage.

    Raises:
        UserError: It can't be used; the text isn't repeated, since it may hold a secret.
    """
    if text is None or not is_postgres(text):
        return default
    try:
        parts = urlsplit(text)
        password, _ = parts.password, parts.port
        given = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    except ValueError:
        raise UserError("ledger: the URL can't be read", hint="For example postgresql://db.example/sisa.") from None
    names = {name for name, _ in given}
    if password is not None or {"password", "sslpassword"} & names:
        raise UserError("ledger: the URL holds a password", hint=SECRETS)
    strange = sorted(names - PARAMETERS)
    if strange:
        raise UserError(
            f"ledger: the URL has the parameter {strange[0][:40]!r}, which is not one of {', '.join(sorted(PARAMETERS))}",
            hint="Sessions are set up by this program, so that a commit is durable.",
        )
    if parts.fragment and not SCHEMA.fullmatch(parts.fragment):
        raise UserError("ledger: the URL's fragment is not the name of a store's schema", hint="Leave it out.")
    url = urlunsplit((SCHEMES[0], parts.netloc, parts.path, urlencode(given, quote_via=quote), ""))
    if importlib.util.find_spec("psycopg") is None:
        raise UserError(
            "ledger: a PostgreSQL server can't be asked: psycopg is not installed",
            hint="Install the extra: pip install 'sisa[postgres]'.",
        )
    return PostgresPlace(_with_slashes(url), parts.fragment)


def _with_slashes(url: str) -> str:
    """``urlunsplit`` drops the slashes of an empty host, which libpq wants."""
    scheme, _, rest = url.partition(":")
    return url if rest.startswith("//") else f"{scheme}://{rest}"


def database_name(place: PostgresPlace) -> str:
    """Return the database that the path names; empty if it names none."""
    return unquote(urlsplit(place.url).path.removeprefix("/"))
