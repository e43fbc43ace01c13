"""The ``sisa`` command: finds the verb, runs it, and turns every error into one message and an exit code.

0 done; 1 a check failed; 2 the caller's mistake; 3 the store is damaged or held by another operation.
(130 after Ctrl-C, and 70 with a traceback on stderr for a mistake of this program.)
Nothing heavier than click is imported before a verb runs.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

import click

from sisa import __version__
from sisa.cli.add import add
from sisa.cli.correct import correct
from sisa.cli.delete import delete
from sisa.cli.migrate import migrate
from sisa.cli.options import print_json, spread_ids
from sisa.cli.predict import predict
from sisa.cli.repair import repair
from sisa.cli.serve import serve
from sisa.cli.status import status
from sisa.cli.submit import submit
from sisa.cli.token import token
from sisa.cli.train import train
from sisa.cli.verify import verify
from sisa.errors import SisaError
from sisa.execution.interrupts import interrupts_deferred

INTERRUPTED = 130
INTERNAL = 70
"""``EX_SOFTWARE`` of sysexits.h."""


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="sisa")
def cli() -> None:
    r"""Train models that can forget.

    Records are routed to shards and slices, one isolated model is trained per shard, and their
    predictions are averaged. Deleting a person takes every model that saw them out of service at once,
    erases rows and weights, and retrains only what has to be: bit for bit what training without
    them would have given.

    \b
    A first round:
      sisa train configs/digits.yaml --store runs/digits
      sisa status --store runs/digits
      sisa delete --store runs/digits --subject 17 --reason "request of 3 May"
      sisa verify --store runs/digits --replay all

    Exit codes: 0 done, 1 a check failed, 2 a mistake in what was asked, 3 the store is damaged or busy.
    Every command takes --json: one JSON object on stdout, everything else on stderr.
    """


for command in (train, add, correct, delete, repair, status, predict, verify, serve, token, submit, migrate):
    cli.add_command(command)
for shown in (cli, *cli.commands.values(), *token.commands.values()):
    # Docstrings are raw, so click's mark for lines that must not be wrapped arrives as two characters.
    shown.help = (shown.help or "").replace(r"\b", "\b")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    # Registered first, so that it runs last: what the interpreter takes apart after that says nothing when interrupted.
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    code = INTERRUPTED
    with contextlib.suppress(KeyboardInterrupt):  # a second one, while the first was being answered
        code = run(words)
    _leave(code)


def _leave(code: int) -> NoReturn:
    """Leave the process; one more Ctrl-C ends it at once, and not in the middle of what libraries do at exit."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(code))
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody listens any more
            stream.flush()
    sys.exit(code)


def run(words: list[str], *, name_ids: bool = True) -> int:
    """Run one command; return its exit code.

    Args:
        words: What was typed.
        name_ids: Whether messages may name ids; others than the caller may read those of a job.
    """
    as_json = "--json" in (words[: words.index("--")] if "--" in words else words)
    if words[:1] == ["--json"]:  # before the verb it means the same
        words = [*words[1:2], *words[:1], *words[2:]] if words[1:] else []
    try:
        code = cli.main(args=spread_ids(words, options=_delete_options()), prog_name="sisa", standalone_mode=False)
    except click.exceptions.Exit as stop:
        return int(stop.exit_code)
    except click.ClickException as error:
        return _misused(error, words, as_json=as_json)
    except SisaError as error:
        # A job's log is kept by others: neither ids nor the names of stages, which outlive them.
        message, place = (error.message, getattr(error, "place", "")) if name_ids else (error.without_ids, "")
        return _failed(f"{message} ({place})" if place else message, error.hint, error.exit_code, as_json=as_json)
    except (click.Abort, KeyboardInterrupt):
        with interrupts_deferred():
            return _failed(
                "interrupted", "Run the command again: it goes on where it stopped.", INTERRUPTED, as_json=as_json
            )
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        message = f"the file system refused: {error.strerror or error}{where}"
        return _failed(message, "Check space and permissions, then run the command again.", 3, as_json=as_json)
    except Exception as error:  # noqa: BLE001 - the last place where a program that reads stdout can be answered
        traceback.print_exc()
        hint = "This is a mistake in sisa, not yours: please report it with the lines on stderr."
        return _failed(f"internal error: {type(error).__name__}", hint, INTERNAL, as_json=as_json)
    return int(code) if isinstance(code, int) else 0


def _delete_options() -> frozenset[str]:
    return frozenset(name for option in delete.params for name in option.opts) | {"-h", "--help"}


def _misused(error: click.ClickException, words: list[str], *, as_json: bool) -> int:
    """Answer what click refused."""
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        if as_json:
            return _failed("no command was given", "See sisa --help.", 2, as_json=True)
        error.show(sys.stderr)
        return 2
    context = getattr(error, "ctx", None)
    verb = next((f"sisa {word}" for word in words[:1] if word in cli.commands), "sisa")
    hint = f"See {context.command_path if context is not None else verb} --help."
    return _failed(error.format_message(), hint, 2, as_json=as_json)


def _failed(message: str, hint: str, code: int, *, as_json: bool) -> int:
    if as_json:
        print_json({"error": {"message": message, "hint": hint}})
    else:
        click.echo(f"error: {message}", err=True)
        if hint:
            click.echo(f"hint: {hint}", err=True)
    return code
