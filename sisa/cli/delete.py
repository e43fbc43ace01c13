"""``sisa delete``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from sisa.cli.options import execution_options, json_option, print_json, store_option, valid_text
from sisa.cli.reporting import reporter
from sisa.cli.wording import deletion_lines
from sisa.errors import UnknownIdsError, UserError


@click.command()
@store_option
@click.option("--subject", "subjects", multiple=True, metavar="ID...", help="A person: everything they own goes.")
@click.option("--record", "records", multiple=True, metavar="ID...", help="A single row.")
@click.option(
    "--from",
    "file",
    metavar="FILE",
    help="People from a text file, one id per line; or Parquet/CSV with the column of the people's ids, else the rows'.",
)
@click.option(
    "--reason",
    default="",
    metavar="TEXT",
    callback=valid_text,
    help="Kept with the request; no personal data, please.",
)
@click.option("--defer", is_flag=True, help="Erase now, retrain later with `sisa repair`.")
@click.option("--ignore-missing", is_flag=True, help="Skip ids that the store doesn't know, even if it knows none.")
@click.option("--no-ids", is_flag=True, help="Name no id in answers and messages, for logs that others read.")
@execution_options
@json_option
def delete(
    store: str,
    subjects: tuple[str, ...],
    records: tuple[str, ...],
    file: str | None,
    reason: str,
    defer: bool,
    ignore_missing: bool,
    no_ids: bool,
    executor: str,
    address: str | None,
    workers: int | None,
    as_json: bool,
) -> None:
    r"""Delete people or records from a store.

    From the moment the request is accepted no prediction uses a model that saw them. Then their rows
    and every weight that descends from them are erased, and the affected part of one shard is
    retrained. Nothing is changed if an id is unknown. Asking twice is answered with the first request.

    \b
    Examples:
      sisa delete --store runs/adult --subject p000017 --reason "ticket 4711"
      sisa delete --store runs/adult --from leavers.txt --defer
      sisa repair --store runs/adult
    """
    from sisa.store.store import open_store

    if sum(map(bool, (subjects, records, file))) != 1:
        raise UserError(
            "expected exactly one of --subject, --record and --from", hint="For example: --subject p000017 p000018"
        )
    sys.path.insert(0, str(Path.cwd()))
    opened = open_store(store)
    if file is not None:
        from sisa.records.ids import read_ids

        data = opened.opened.recipe.data
        kind, ids = read_ids(file, subject_column=data.subject_column, record_column=data.record_id)
        subjects, records = (tuple(ids), ()) if kind == "subject" else ((), tuple(ids))
    try:
        done = opened.delete(
            subjects=subjects,
            records=records,
            reason=reason,
            defer=defer,
            ignore_missing=ignore_missing,
            executor=executor,
            address=address,
            workers=workers,
            reporter=reporter(),
        )
    except UnknownIdsError as error:
        if not no_ids:
            raise
        raise UserError(error.without_ids, hint=error.hint) from None
    if as_json:
        print_json({**done.as_dict(), **({"missing": None} if no_ids else {})})
        return
    for line in deletion_lines(done):
        click.echo(line)
