"""``sisa migrate``."""

from __future__ import annotations

import click

from sisa.cli.options import json_option, print_json, store_option


@click.command()
@store_option
@json_option
def migrate(store: str, as_json: bool) -> None:
    r"""Bring the ledger of an older release to this one's form.

    Nothing else is changed. End every command and server on the store before, older releases' ones too, and make
    a backup: an older release can't read the ledger afterwards.

    \b
    Example:
      sisa migrate --store runs/adult
    """
    from sisa.opening import migrate_ledger
    from sisa.remote import locate

    schema = migrate_ledger(locate(store))
    if as_json:
        print_json({"schema": schema})
        return
    click.echo(f"the ledger has schema {schema}")
