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
    r"""Finish open deletions and heal damaged stages.

    Open are deletions that were deferred, killed or failed on the way. Every stage is read and verified; one
    that is missing or damaged is trained again from the last good one.

    \b
    Examples:
      sisa repair --store runs/adult
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
