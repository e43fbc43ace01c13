"""``sisa add``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from sisa.cli.options import execution_options, json_option, print_json, store_option
from sisa.cli.reporting import reporter
from sisa.cli.wording import addition_lines


@click.command()
@store_option
@click.option(
    "--source", required=True, metavar="TABLE", help="New rows: what `data.source` of a config may be, same columns."
)
@click.option("--defer", is_flag=True, help="Add the rows now, train later with `sisa train` or `sisa repair`.")
@execution_options
@json_option
def add(
    store: str, source: str, defer: bool, executor: str, address: str | None, workers: int | None, as_json: bool
) -> None:
    r"""Add new rows, as a new last slice of every shard.

    Nothing that was trained before changes: each shard trains one more stage on top of its chain. Rows of
    deleted people are left out. Nothing is changed if a record id is in the store already, or if a row can't
    be used. Run the same command again after a crash and it goes on.

    \b
    Examples:
      sisa add --store runs/adult --source may.parquet
      sisa add --store runs/adult --source 'june/*.csv' --defer
      sisa train configs/adult.yaml --store runs/adult
    """
    from sisa.store.store import open_store

    sys.path.insert(0, str(Path.cwd()))  # a model factory may lie in the current folder
    done = open_store(store).add(
        source, defer=defer, executor=executor, address=address, workers=workers, reporter=reporter()
    )
    if as_json:
        print_json(done.as_dict())
        return
    for line in addition_lines(done):
        click.echo(line)
