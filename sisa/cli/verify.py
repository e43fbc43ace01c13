"""``sisa verify``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sisa.cli.options import execution_options, json_option, print_json, store_option
from sisa.cli.reporting import reporter
from sisa.cli.wording import verification_lines
from sisa.errors import DamagedError

if TYPE_CHECKING:
    from sisa.proof.verify import Verification


class ReplayChoice(click.ParamType[str | int]):
    """``none``, ``all`` or a number of constituents."""

    name = "none|all|N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str | int:
        """Read the option's value."""
        if value in {"none", "all"}:
            return str(value)
        try:
            number = int(value)
        except ValueError:
            number = 0
        if number < 1:
            self.fail(f"expected none, all or a positive number of constituents, got {value!r}", param, ctx)
        return number


@click.command()
@store_option
@click.option(
    "--replay",
    type=ReplayChoice(),
    metavar="none|all|N",
    default="none",
    show_default=True,
    help="Retrain all, or N random, constituents from nothing.",
)
@execution_options
@json_option
@click.pass_context
def verify(
    context: click.Context,
    store: str,
    replay: str | int,
    executor: str,
    address: str | None,
    workers: int | None,
    as_json: bool,
) -> None:
    r"""Check a store without trusting it.

    Recomputes from the rows on disk which stages there should be, checks every byte of them, looks for
    rows of deleted people, for leftovers and for files that nobody answers for. With --replay it
    retrains constituents from nothing and compares them bit for bit. Exits with 1, and with the list,
    if anything is wrong.

    \b
    Examples:
      sisa verify --store runs/adult
      sisa verify --store runs/adult --replay all --executor ray
    """
    from sisa.store.store import open_store

    sys.path.insert(0, str(Path.cwd()))
    try:
        opened = open_store(store)
    except DamagedError as error:
        found = _unopened(error)
    else:
        found = opened.verify(
            replay=replay,  # type: ignore[arg-type]
            executor=executor,
            address=address,
            workers=workers,
            reporter=reporter(),
        )
    if as_json:
        print_json(found.as_dict())
    else:
        for line in verification_lines(found, replay=replay != "none"):
            click.echo(line)
    context.exit(0 if found.ok else 1)


def _unopened(error: DamagedError) -> Verification:
    """A store that can't be opened fails the check like any other damage; nothing more can be said of it."""
    from sisa.proof.verify import Verification

    click.echo(f"hint: {error.hint}", err=True)
    return Verification(ok=False, problems=[error.message])
