"""``sisa repair``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from sisa.cli.options import execution_options, json_option, print_json, store_option
from sisa.cli.reporting import reporter
from sisa.cli.wording import repair_lines


@click.command()
@store_option
@execution_options
@json_option
def repair(store: str, executor: str, address: str | None, workers: int | None, as_json: bool) -> None:
    r"""Finish what is open: deferred or killed deletions, missing or damaged stages.

    \b
    Example:
      sisa repair --store runs/adult --executor ray
    """
    from sisa.store.store import open_store

    sys.path.insert(0, str(Path.cwd()))
    done = open_store(store).repair(executor=executor, address=address, workers=workers, reporter=reporter())
    if as_json:
        print_json(done.as_dict())
        return
    for line in repair_lines(done):
        click.echo(line)
