"""``sisa train``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from sisa.cli.options import execution_options, json_option, print_json
from sisa.cli.reporting import reporter
from sisa.cli.wording import counted, metrics_lines


@click.command()
@click.argument("config", metavar="CONFIG.yaml")
@click.option("--store", metavar="URI", help="Where the trained ensemble goes; overrides `store:` of the config.")
@click.option(
    "--set", "overrides", multiple=True, metavar="a.b=value", help="Override a field of the config; repeatable."
)
@click.option("--upgrade", is_flag=True, help="Rebuild everything if the code or the platform changed since.")
@execution_options
@json_option
def train(
    config: str,
    store: str | None,
    overrides: tuple[str, ...],
    upgrade: bool,
    executor: str,
    address: str | None,
    workers: int | None,
    as_json: bool,
) -> None:
    r"""Train what isn't trained yet.

    Run it again after a crash and it goes on; run it on a finished store and it trains nothing. A store
    keeps its recipe: another one is refused, with the difference.

    \b
    Examples:
      sisa train configs/digits.yaml --store runs/digits
      sisa train configs/adult.yaml --set training.epochs=10 --executor ray --workers 2
    """
    from sisa.recipe import load_recipe
    from sisa.store.launch import train as train_store

    sys.path.insert(0, str(Path.cwd()))  # a model factory may lie in the current folder
    recipe = load_recipe(config, overrides=overrides)
    done = train_store(
        recipe,
        store=store,
        executor=executor,
        address=address,
        workers=workers,
        upgrade=upgrade,
        reporter=reporter(),
    ).training
    if done is None:
        return
    if as_json:
        print_json(done.as_dict())
        return
    trained = f"trained {counted(done.stages_trained, 'stage')}" if done.stages_trained else "nothing to train"
    click.echo(f"{trained}, {done.stages_reused} were there already ({done.seconds:.1f} s)")
    click.echo(
        f"{done.store}: version {done.version}, {counted(done.records, 'record')} of "
        f"{counted(done.subjects, 'subject')} "
        f"in {done.shards} shards x {done.slices} slices, {done.holdout_records:,} held out"
    )
    for line in metrics_lines(done.metrics):
        click.echo(line)
