"""``sisa predict``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from sisa.cli.options import json_option, print_json, store_option
from sisa.cli.reporting import reporter
from sisa.cli.wording import counted


@click.command()
@store_option
@click.argument("source", metavar="INPUT.parquet")
@click.option("--output", required=True, metavar="OUT.parquet", help="Where the table goes.")
@json_option
def predict(store: str, source: str, output: str, as_json: bool) -> None:
    r"""Add prediction, scores and version to a table.

    Scores are one probability per class, in the order of the recipe's classes. Label and id columns are
    not needed; what the input has is kept.

    \b
    Example:
      sisa predict --store runs/adult new-people.parquet --output answers.parquet
    """
    from sisa.store.predict import predict_table
    from sisa.store.store import open_store

    sys.path.insert(0, str(Path.cwd()))
    done = predict_table(open_store(store), source, output, reporter=reporter())
    if as_json:
        print_json(done.as_dict())
        return
    click.echo(
        f"{done.output}: {counted(done.rows, 'row')} answered by version {done.version} "
        f"({counted(done.voters, 'voter')})"
    )
