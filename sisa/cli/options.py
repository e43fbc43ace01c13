"""Options that several verbs share, and the printing of answers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

ID_OPTIONS = frozenset({"--subject", "--record"})
NEGATIVE = re.compile(r"-\d+")
"""No option is a number, so this can only be an id."""


def store_option(function: F) -> F:
    """Add ``--store``."""
    return click.option("--store", required=True, metavar="URI", help="Folder, or s3://BUCKET/PREFIX.")(function)


def json_option(function: F) -> F:
    """Add ``--json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")(function)


def execution_options(function: F) -> F:
    """Add ``--executor``, ``--address`` and ``--workers``."""
    for option in (
        click.option(
            "--workers", type=click.IntRange(min=1), metavar="N", help="Chains trained at a time (default: cores)."
        ),
        click.option("--address", metavar="RAY", help="A running Ray cluster, e.g. head:6379 or auto."),
        click.option(
            "--executor",
            type=click.Choice(["auto", "ray", "inline"]),
            default="auto",
            show_default=True,
            help="auto: in this process where the work is a few seconds, else on Ray.",
        ),
    ):
        function = option(function)
    return function


def spread_ids(words: list[str], *, options: frozenset[str] = frozenset()) -> list[str]:
    """Let ``--subject a b c`` stand for ``--subject a --subject b --subject c``.

    >>> spread_ids(["delete", "--subject", "-x", "b", "-2", "--defer"])
    ['delete', '--subject', '-x', '--subject', 'b', '--subject', '-2', '--defer']

    Args:
        words: What was typed.
        options: Options that are never ids, so that a forgotten id is noticed.

    Raises:
        click.UsageError: An option stands where an id should.
    """
    spread: list[str] = []
    option, first = "", False
    for word in words:
        if first:
            if word in options:
                raise click.UsageError(
                    f"{option}: expected an id, got the option {word} (if that is an id, write {option}={word})"
                )
            spread.append(word)
            first = False
        elif word in ID_OPTIONS:
            option, first = word, True
            spread.append(word)
        elif option and (not word.startswith("-") or NEGATIVE.fullmatch(word)):
            spread += [option, word]
        else:
            option = ""
            spread.append(word)
    return spread


def print_json(answer: dict[str, Any]) -> None:
    """Print an answer as one JSON object: in ASCII, which every reader takes, whatever a path is made of."""
    click.echo(json.dumps(answer, default=str))


def valid_text(_: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Check a word that is stored or looked up (a click callback): bytes that aren't UTF-8 can't be.

    Raises:
        click.BadParameter: It is no Unicode text.
    """
    if value is not None and any("\ud800" <= character <= "\udfff" for character in value):
        raise click.BadParameter("not valid Unicode text", param=param)
    return value
