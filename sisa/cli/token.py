"""``sisa token``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from sisa.cli.options import json_option, print_json, store_option, valid_text
from sisa.cli.wording import counted

if TYPE_CHECKING:
    from sisa.ledger import Token


@click.group()
def token() -> None:
    r"""Make, list and revoke the tokens that the server asks for.

    A token opens what its scopes name: predict, delete, read (state, requests, metrics), or admin, which is
    everything. The store keeps a digest of it, never the token.

    \b
    Examples:
      sisa token create --store runs/adult --scope predict,delete --name "web shop"
      sisa token list --store runs/adult
      sisa token revoke --store runs/adult 0123456789abcdef
    """


@token.command()
@store_option
@click.option(
    "--scope",
    "scopes",
    required=True,
    multiple=True,
    metavar="SCOPE[,SCOPE...]",
    callback=lambda context, param, value: tuple(valid_text(context, param, word) for word in value),
    help="What it opens: predict, delete, read, admin.",
)
@click.option(
    "--name",
    default="",
    metavar="TEXT",
    callback=valid_text,
    help="Shown in the list; no personal data, please.",
)
@json_option
def create(store: str, scopes: tuple[str, ...], name: str, as_json: bool) -> None:
    r"""Make a token and print it, once.

    The token is alone on stdout. It can't be shown again: who loses it makes another and revokes the first.

    \b
    Examples:
      sisa token create --store runs/adult --scope predict > token.txt
      sisa token create --store runs/adult --scope predict,delete --name "web shop" --json
    """
    from sisa.store.store import open_store

    words = [word.strip() for scope in scopes for word in scope.split(",")]
    text, made = open_store(store).opened.ledger.tokens.create(filter(None, words), name=name)
    if as_json:
        print_json({"token": text, "id": made.id, "scopes": list(made.scopes)})
    else:
        click.echo(text)
    click.echo(f"token {made.id} for {', '.join(made.scopes)}: shown only now, keep it safe", err=True)


@token.command("list")
@store_option
@json_option
def list_tokens(store: str, as_json: bool) -> None:
    r"""List the tokens: id, scopes, name, day of making and of last use; never the token itself.

    \b
    Example:
      sisa token list --store runs/adult
    """
    from sisa.store.store import open_store

    tokens = open_store(store).opened.ledger.tokens.all()
    if as_json:
        print_json({"tokens": [_as_dict(entry) for entry in tokens]})
    elif not tokens:
        click.echo("no tokens")
    else:
        click.echo(counted(len(tokens), "token"))
        for entry in tokens:
            used = f"last used {entry.last_used_on}" if entry.last_used_on else "never used"
            words = (entry.id, f"made {entry.created_at[:10]}", f"{used:<20}", ",".join(entry.scopes), entry.name)
            click.echo("  ".join(words).rstrip())


@token.command()
@store_option
@click.argument("identifier", metavar="ID", callback=valid_text)
@json_option
def revoke(store: str, identifier: str, as_json: bool) -> None:
    r"""Revoke a token: the next request that carries it is refused.

    Running servers needn't be told. A whole token is taken for its id too.

    \b
    Example:
      sisa token revoke --store runs/adult 0123456789abcdef
    """
    from sisa.store.store import open_store

    revoked = open_store(store).opened.ledger.tokens.revoke(identifier)
    if as_json:
        print_json({"id": revoked.id, "scopes": list(revoked.scopes)})
    else:
        click.echo(f"token {revoked.id} opens nothing any more")


def _as_dict(entry: Token) -> dict[str, Any]:
    return {
        "id": entry.id,
        "scopes": list(entry.scopes),
        "name": entry.name,
        "created_at": entry.created_at,
        "last_used_on": entry.last_used_on,
    }
