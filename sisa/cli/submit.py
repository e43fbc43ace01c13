"""``sisa submit``."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import click

from sisa.cli.options import json_option, print_json
from sisa.errors import SisaError, UserError

if TYPE_CHECKING:
    from sisa.execution.jobs import JobEnd, Jobs

STORE_FILES = ("ledger.db", "keys", "checkpoints")
"""What tells a store: it is never sent along."""


class LeftError(SisaError):
    """Nobody watches the job any more; it goes on."""

    exit_code: ClassVar[int] = 130


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("--address", envvar="RAY_API_SERVER_ADDRESS", required=True, metavar="URL",
              help="The cluster's dashboard, e.g. http://head:8265 (default: RAY_API_SERVER_ADDRESS).")  # fmt: skip
@click.option("--env", "needs", multiple=True, metavar="NAME", help="A variable that must be set on the cluster; repeatable.")  # fmt: skip
@click.option("--include", multiple=True, metavar="PATH", help="Send a module of model.factory along; repeatable.")
@click.option("--package", default="this", show_default=True, metavar="this|installed|WHEEL",
              help="Which sisa runs: this one, the one in the cluster's image, or a wheel.")  # fmt: skip
@click.option("--python", default="python", show_default=True, metavar="COMMAND", help="Python on the cluster.")
@click.option("--cpus", default=0.0, type=click.FloatRange(0), metavar="N", help="Cores for the command itself.")
@click.option("--no-wait", is_flag=True, help="Print the job's id and don't watch it.")
@click.option("--attach", metavar="JOB", help="Watch a job that runs already, instead of starting one.")
@click.option("--stop", metavar="JOB", help="Stop a job; what it has finished is kept.")
@json_option
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="COMMAND...")
@click.pass_context
def submit(
    context: click.Context,
    address: str,
    needs: tuple[str, ...],
    include: tuple[str, ...],
    package: str,
    python: str,
    cpus: float,
    no_wait: bool,
    attach: str | None,
    stop: str | None,
    as_json: bool,
    words: tuple[str, ...],
) -> None:
    r"""Run a command as a job on a Ray cluster.

    The job's log is shown as it comes, and its exit code is this command's. Ctrl-C ends the watching, not the job.
    Commands: train, repair, verify, and delete with --from. The recipe is sent along; rows, keys and the values of
    variables never are.

    \b
    Examples:
      sisa submit --address http://head:8265 train recipe.yaml --store /shared/adult
      sisa submit --address http://head:8265 --env PGPASSWORD repair --store /shared/adult
      sisa submit --address http://head:8265 delete --store /shared/adult --from /shared/leavers.txt
    """
    from sisa.execution.jobs import Jobs

    if (bool(words) + bool(attach) + bool(stop)) != 1:
        raise UserError("expected exactly one of a command, --attach and --stop", hint="See sisa submit --help.")
    if stop is not None:
        Jobs(address).stop(stop)
        _say({"job": stop, "address": address, "status": "STOPPING"}, f"job {stop} was told to stop", as_json=as_json)
        return
    if attach is not None:
        jobs, job = Jobs(address), attach
    else:
        jobs, job = _started(
            list(words), address=address, needs=needs, include=include, package=package, python=python, cpus=cpus,
            as_json=as_json,
        )  # fmt: skip
    if no_wait:
        _say({"job": job, "address": address, "status": "PENDING"}, job, as_json=as_json)
        return
    click.echo(f"job {job} on {address}", err=True)
    context.exit(_watched(jobs, job, as_json=as_json))


def _started(
    words: list[str],
    *,
    address: str,
    needs: tuple[str, ...],
    include: tuple[str, ...],
    package: str,
    python: str,
    cpus: float,
    as_json: bool,
) -> tuple[Jobs, str]:
    from sisa.cli.jobwords import job_words
    from sisa.execution.jobs import Jobs, JobSpec

    asked = job_words(words, needs=list(needs), as_json=as_json)  # before anything is asked of the cluster
    with _sent(asked.recipe, include) as folder, _package(package) as code:
        jobs = Jobs(address)
        return jobs, jobs.submit(JobSpec(asked.entrypoint(python), folder, code, cpus))


def _watched(jobs: Jobs, job: str, *, as_json: bool) -> int:
    """Show the log to the end; return the job's exit code."""
    log: list[str] = []

    def write(text: str) -> None:
        if as_json:
            log.append(text)
        click.echo(text, nl=False, err=as_json)

    try:
        end = jobs.follow(job, write)
    except KeyboardInterrupt:
        raise LeftError(
            f"job {job} goes on: only the watching ended",
            hint=f"Watch it again with --attach {job}; stop it with --stop {job} (and the same --address).",
        ) from None
    if end.message:
        click.echo(f"error: job {job}: {end.message}", err=True)
    if as_json:
        print_json(_answer(jobs, job, end, "".join(log)))
    return end.exit_code


def _answer(jobs: Jobs, job: str, end: JobEnd, log: str) -> dict[str, Any]:
    return {
        "job": job,
        "address": jobs.address,
        "status": end.status,
        "exit_code": end.exit_code,
        "message": end.message,
        "answer": _last_object(log),
    }


def _last_object(log: str) -> dict[str, Any] | None:
    """Return the JSON object that the command printed, which is on a line of its own."""
    for line in reversed(log.splitlines()):
        if line.startswith("{"):
            with contextlib.suppress(ValueError):
                found = json.loads(line)
                return found if isinstance(found, dict) else None
    return None


def _say(answer: dict[str, Any], text: str, *, as_json: bool) -> None:
    if as_json:
        print_json(answer)
    else:
        click.echo(text)


@contextlib.contextmanager
def _sent(recipe: Path | None, include: tuple[str, ...]) -> Iterator[Path]:
    """Make the folder that is sent along: the recipe and what was named, and nothing that merely lies beside them."""
    with tempfile.TemporaryDirectory(prefix="sisa-job-") as name:
        folder = Path(name)
        for path in [*([recipe] if recipe is not None else []), *map(Path, include)]:
            _copy(path, folder)
        yield folder


def _copy(path: Path, folder: Path) -> None:
    if (folder / path.name).exists():
        raise UserError(f"--include: {path.name!r} is sent already", hint="What is sent needs names of its own.")
    if path.is_symlink() or any(below.is_symlink() for below in path.rglob("*")):
        raise UserError(
            f"--include {str(path)!r}: symbolic links aren't followed",
            hint="Name what they point to, if it may be sent.",
        )
    if path.is_dir():
        if any((path / name).exists() for name in STORE_FILES):
            raise UserError(f"--include {str(path)!r}: a store is never sent", hint="Name modules of the model only.")
        shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns("__pycache__"))
    elif path.is_file():
        shutil.copyfile(path, folder / path.name)
    else:
        raise UserError(f"--include {str(path)!r}: there is no such file", hint="Name a module, or a package's folder.")


@contextlib.contextmanager
def _package(which: str) -> Iterator[Path | None]:
    """Yield the folder of the package to run; None for the one that is installed on the cluster."""
    if which == "installed":
        yield None
    elif which == "this":
        yield Path(__file__).resolve().parent.parent
    else:
        with tempfile.TemporaryDirectory(prefix="sisa-wheel-") as name:
            # Unpacked, not installed: pip would fetch all that the package needs beside the cluster's own.
            yield _unpacked(Path(which), Path(name))


def _unpacked(wheel: Path, folder: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder, [name for name in archive.namelist() if name.startswith("sisa/")])
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(
            f"--package {str(wheel)!r}: expected this, installed or a wheel: {error}",
            hint="A wheel is made with `pip wheel --no-deps .`.",
        ) from error
    if not (folder / "sisa" / "__init__.py").is_file():
        raise UserError(f"--package {str(wheel)!r}: this wheel holds no sisa", hint="Give a wheel of this package.")
    return folder / "sisa"
