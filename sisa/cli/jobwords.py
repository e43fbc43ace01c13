"""Which commands may run as a job, and with which words. Pure, but for reading the recipe.

A job's command line stands on the cluster's dashboard and in its logs, and its working folder is removed with it. So
no id of a person and no password may be among its words, and every path must mean the same on the cluster.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import click

from sisa.cli.delete import delete
from sisa.cli.options import spread_ids
from sisa.cli.repair import repair
from sisa.cli.train import train
from sisa.cli.verify import verify
from sisa.errors import UserError

VERBS: dict[str, click.Command] = {"train": train, "repair": repair, "verify": verify, "delete": delete}
PASSWORD = re.compile(r"://[^/\s:@]*:[^/\s@]+@")
"""A password inside an address."""
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
MODULE = "sisa.cli.jobmain"


@dataclass(frozen=True)
class JobWords:
    """A command that may run as a job."""

    verb: str
    words: list[str]
    """As the job is told them."""
    recipe: Path | None = None
    """The file to send along."""
    needs: list[str] = field(default_factory=list)

    def entrypoint(self, python: str) -> str:
        """The job's command line."""
        needs = [word for name in self.needs for word in ("--need", name)]
        return shlex.join([python, "-m", MODULE, *needs, "--", *self.words])


def job_words(words: list[str], *, needs: list[str], as_json: bool) -> JobWords:
    """Check a command and make it one for a job.

    Args:
        words: A verb and what follows it, as it would be typed after ``sisa``.
        needs: Names of variables that must be set where the job runs.
        as_json: Whether the answer shall be JSON.

    Raises:
        UserError: It can't run as a job; the message says why.
        click.ClickException: It can't run anywhere.
    """
    verb = words[0] if words else ""
    if verb not in VERBS:
        raise UserError(
            f"expected a command to run as a job ({', '.join(VERBS)}), got {verb or 'nothing'!r}",
            hint="For example: sisa submit --address http://head:8265 train recipe.yaml --store /shared/adult",
        )
    _refuse_passwords(words)
    asked = _parsed(verb, words[1:])
    _refuse_address(asked)
    recipe = None
    if verb == "train":
        recipe = _recipe(asked)
    else:
        _elsewhere({"--store": asked["store"]})
    if verb == "delete":
        _refuse_ids(asked)
    return JobWords(verb, _told(verb, words[1:], asked, as_json=as_json), recipe, _checked_names(needs))


def _parsed(verb: str, words: list[str]) -> dict[str, Any]:
    # The words for help as `sisa` has them: a command remembers those of the first context that it meets.
    parent = click.Context(click.Group("sisa"), info_name="sisa", help_option_names=["-h", "--help"])
    context = VERBS[verb].make_context(verb, spread_ids(list(words)), parent=parent)
    return context.params


def _told(verb: str, words: list[str], asked: dict[str, Any], *, as_json: bool) -> list[str]:
    if verb == "train":  # the recipe lies in the job's folder, under its own name
        words = [Path(word).name if word == asked["config"] else word for word in words]
    added = ["--address", "auto"] if asked["executor"] != "inline" else []
    added += ["--json"] if as_json and not asked["as_json"] else []
    end = words.index("--") if "--" in words else len(words)  # what comes after it is no option
    return [verb, *words[:end], *added, *words[end:]]


def _refuse_passwords(words: list[str]) -> None:
    if any(PASSWORD.search(word) for word in words):
        raise UserError(
            "a word of the command holds a password, and a job's command line is shown on the dashboard",
            hint="Keep it in a secret of the cluster, and name the variable that it is in with --env.",
        )


def _refuse_address(asked: dict[str, Any]) -> None:
    if asked["address"] is not None:
        raise UserError(
            "--address of the command: a job runs on the cluster that it is submitted to",
            hint="Give --address before the command, with the dashboard's address.",
        )


def _refuse_ids(asked: dict[str, Any]) -> None:
    if asked["subjects"] or asked["records"]:
        raise UserError(
            "--subject and --record: a job's command line is shown on the dashboard, and stays in Ray's logs, "
            "so it must not hold anybody's id",
            hint="Write the ids to a file on the cluster's shared storage, and give --from FILE.",
        )
    if asked["file"] is None:
        raise UserError("delete: expected --from FILE", hint="The file lies on the cluster's shared storage.")
    file = asked["file"]
    if not _means_the_same(file):
        raise UserError(
            f"--from {file!r}: expected a file on the cluster's shared storage, by its absolute path; a file of this "
            "machine would have to be sent along, and copies of the ids would stay in Ray's folders",
            hint="Put it where the nodes see it, for example beside the store, and remove it afterwards.",
        )


def _recipe(asked: dict[str, Any]) -> Path:
    """Check that a recipe's paths mean the same on the cluster."""
    from sisa.recipe import dump_recipe, load_recipe

    recipe = load_recipe(asked["config"], overrides=asked["overrides"])
    if PASSWORD.search(dump_recipe(recipe)):
        raise UserError(
            "the recipe holds a password, and it is sent to the cluster as it is",
            hint="Keep it in a secret of the cluster, and name the variable that it is in with --env.",
        )
    aggregation = recipe.sisa.aggregation
    _elsewhere(
        {
            "data.source": recipe.data.source,
            "data.holdout.source": recipe.data.holdout.source,
            "sisa.aggregation.table": None if isinstance(aggregation, str) else aggregation.table,
            "routing.key_file": recipe.routing.key_file,
            **({"--store": asked["store"]} if asked["store"] else {"store": recipe.store or ""}),
        }
    )
    return Path(asked["config"])


def _elsewhere(places: dict[str, str | None]) -> None:
    """Refuse places that would lie in the job's own folder, which is removed with it."""
    wrong = [f"{name}: {place!r}" for name, place in places.items() if place is not None and not _means_the_same(place)]
    if wrong:
        raise UserError(
            f"expected absolute paths that every node sees, or addresses; got {', '.join(wrong)}",
            hint="A job has a folder of its own, which is removed with it.",
        )


def _means_the_same(place: str) -> bool:
    return "://" in place or place.startswith("builtin:") or PurePosixPath(place).is_absolute()


def _checked_names(needs: list[str]) -> list[str]:
    if not all(NAME.fullmatch(name) for name in needs):  # what was given may be a secret: it isn't repeated
        raise UserError(
            "--env: expected the name of a variable; values aren't taken, since jobs' settings are shown on the dashboard",
            hint="Set the variable where the cluster's nodes run, from a secret, and give its name here.",
        )
    return needs
