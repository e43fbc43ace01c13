"""Several processes at one store whose ledger, locks and marks lie on a server: what holds with files holds there too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import crash_kit as kit
import pyarrow.parquet as papq
import pytest
from postgres_kit import Server
from test_races import (  # noqa: F401 - collected here once more, with the world below
    PROBE,
    TABLE,
    World,
    _nobody_left,
    check_deletion_against_repair,
    check_same_subject,
    check_two_deletions,
    test_a_deletion_during_a_repair_of_its_shard,
    test_a_deletion_during_a_training_leaves_no_tainted_bytes,
    test_a_deletion_during_the_first_training,
)


class OnServer(World):
    """A ledger can't be copied with its folder: each copy is trained from the same source, under the same key."""

    def copy(self, name: str) -> Path:
        kit.trained(self.recipe, self.folder / name).close()
        return self.folder / name


@pytest.fixture(scope="module")
def world(postgres: Server) -> Iterator[World]:
    with kit.fast_folder() as folder, pytest.MonkeyPatch.context() as surroundings:
        surroundings.setenv("PGPASSWORD", postgres.secret)
        before = schemas(postgres)
        recipe = {**kit.make_recipe(folder, TABLE), "ledger": postgres.url()}
        store = kit.trained(recipe, folder / "template")
        people: dict[tuple[int, int], list[str]] = {}
        for person, place in kit.places(store, TABLE).items():
            people.setdefault(place, []).append(person)
        store.close()
        papq.write_table(PROBE, folder / "probe.parquet")
        yield OnServer(folder, recipe, folder / "template", people)
        postgres.end_sessions()
        for name in schemas(postgres) - before:
            postgres.ask(f"DROP SCHEMA {name} CASCADE")


def schemas(postgres: Server) -> set[str]:
    return {row[0] for row in postgres.ask("SELECT nspname FROM pg_namespace WHERE nspname LIKE 'sisa%'")}


def test_the_same_subject_from_two_processes_is_one_request(world: World) -> None:
    check_same_subject(world, most=2)


@pytest.mark.slow
def test_two_deletions_from_one_slice_at_every_point(world: World) -> None:
    check_two_deletions(world, most=1000)


@pytest.mark.slow
def test_the_same_subject_at_every_point(world: World) -> None:
    check_same_subject(world, most=1000)


@pytest.mark.slow
def test_a_repair_at_every_point_of_a_deletion(world: World) -> None:
    check_deletion_against_repair(world, most=1000)
