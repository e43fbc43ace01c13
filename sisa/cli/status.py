"""``sisa status``."""

from __future__ import annotations

from typing import Any

import click

from sisa.cli.options import json_option, print_json, store_option, valid_text
from sisa.cli.wording import counted

FILE_WIDTH = 120
"""Columns of the tables where no terminal says how many there are."""


@click.command()
@store_option
@click.argument("request", required=False, callback=valid_text)
@json_option
def status(store: str, request: str | None, as_json: bool) -> None:
    r"""Show what is live, and the deletion requests.

    One line for each shard, with the stage that answers for it. With REQUEST, all that is known about that
    deletion.

    \b
    Examples:
      sisa status --store runs/adult
      sisa status --store runs/adult del-0123456789abcdef
    """
    from sisa.store.store import open_store

    opened = open_store(store)
    answer = opened.status()
    if request is not None:
        opened.request(request)
        answer["requests"] = [r for r in answer["requests"] if r["request"] == request]
    if as_json:
        print_json(answer)
    elif request is not None:
        _print_request(answer["requests"][0])
    else:
        _print_store(answer)


def _print_request(request: dict[str, Any]) -> None:
    for name, value in request.items():
        click.echo(f"{name.replace('_', ' '):>20}  {value if value not in (None, '', []) else '-'}")


def _stages(serving: int, slices: int, *, generations: int) -> str:
    """Draw a chain: a mark for each stage, those that served rows saw as ``#``; generations come after a ``+``.

    >>> _stages(3, 5, generations=2), _stages(2, 2, generations=0)
    ('###+..', '##')
    """
    marks = "".join("#" if stage <= serving else "." for stage in range(1, slices + 1))
    first = slices - generations
    return f"{marks[:first]}+{marks[first:]}" if generations else marks


def _print_store(answer: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = FILE_WIDTH
    click.echo(
        f"version {answer['version']}, {answer['state']}: {counted(answer['records'], 'record')} of "
        f"{counted(answer['subjects'], 'subject')}, {answer['holdout_records']:,} held out"
    )
    table = Table(title=None, box=None, pad_edge=False)
    for heading in ("shard", "stages", "serving", "records", "key", "state digest"):
        table.add_column(heading)
    for member in answer["constituents"]:
        stages = _stages(member["stage"], answer["slices"], generations=answer["generations"])
        if member["stage"] == 0:
            serving = "out of service" if member["quarantined"] else "absent"
        else:
            serving = f"stage {member['stage']}" + (" (quarantine)" if member["quarantined"] else "")
        table.add_row(
            str(member["shard"]), stages, serving, f"{member['records']:,}", member["key"][:12] or "-",
            member["state_digest"][:12] or "-",
        )  # fmt: skip
    console.print(table)
    if not answer["requests"]:
        click.echo("no deletion requests")
        return
    requests = Table(title=None, box=None, pad_edge=False)
    requests.add_column("request", no_wrap=True, min_width=20)  # whole, so that it can be copied
    for heading in ("state", "received", "subjects", "records", "shards", "live again"):
        requests.add_column(heading)
    for r in answer["requests"]:
        requests.add_row(
            r["request"], r["state"], r["created_at"][:10], str(r["subjects"]), str(r["records"]),
            ", ".join(map(str, r["shards"])) or "-", f"version {r['version_after']}" if r["version_after"] else "-",
        )  # fmt: skip
    console.print(requests)
