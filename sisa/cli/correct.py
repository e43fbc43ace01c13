"""``sisa correct``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from sisa.cli.options import execution_options, json_option, print_json, store_option, valid_text
from sisa.cli.reporting import reporter
from sisa.cli.wording import correction_lines


@click.command()
@store_option
@click.option("--source", required=True, metavar="TABLE", help="Rows of the store as they should be, same columns.")
@click.option(
    "--reason",
    default="",
    metavar="TEXT",
    callback=valid_text,
    help="Kept with the request; no personal data, please.",
)
@click.option("--defer", is_flag=True, help="Replace the rows now, retrain later with `sisa repair`.")
@execution_options
@json_option
def correct(
    store: str,
    source: str,
    reason: str,
    defer: bool,
    executor: str,
    address: str | None,
    workers: int | None,
    as_json: bool,
) -> None:
    r"""Correct rows that are in the store.

    From the moment the request is accepted no prediction uses a model that saw what the rows said. Then they
    are replaced, every weight that descends from them is erased, and the affected part of each shard is
    retrained. Nothing is changed if a row is unknown, was deleted, or belongs to somebody else.

    \b
    Examples:
      sisa correct --store runs/adult --source corrected.parquet --reason "ticket 4712"
      sisa correct --store runs/adult --source corrected.csv --defer
    """
    from sisa.store.store import open_store

    sys.path.insert(0, str(Path.cwd()))  # a model factory may lie in the current folder
    done = open_store(store).correct(
        source,
        reason=reason,
        defer=defer,
        executor=executor,
        address=address,
        workers=workers,
        reporter=reporter(),
    )
    if as_json:
        print_json(done.as_dict())
        return
    for line in correction_lines(done):
        click.echo(line)
