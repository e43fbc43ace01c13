"""``sisa verify``, and what every command says of a store that was tampered with."""

from __future__ import annotations

import re
import shutil
import sys

import pyarrow.parquet as papq
import pytest
from cli_kit import Cli, assert_fields, content, documented, households, people, place_of, trained

from sisa.files import FileLock

FOUND = {
    "ok": bool, "problems": [str], "stages_checked": int, "stages_replayed": int, "replayed_shards": [int],
    "workers": [str], "comparison": str, "fingerprint": dict, "open_requests": [str],
}  # fmt: skip
VERBS = {
    "train": ["recipe.yaml"], "delete": ["--subject", "h001"], "repair": [], "status": [],
    "predict": ["people.parquet", "--output", "out.parquet"],
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    trained(folder)
    return folder


@pytest.fixture
def cli(capsys, monkeypatch, tmp_path, folder):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    return Cli(capsys)


@pytest.fixture
def store(cli):
    return cli.folder / "store"


def flipped(path, *, at=-40):
    """Change one byte of a file."""
    content = bytearray(path.read_bytes())
    content[at] ^= 0xFF
    path.write_bytes(content)


def stage(store, shard, number):
    (found,) = store.glob(f"checkpoints/shard-{shard:04d}/stage-{number:02d}-*")
    return found


def rows(store, shard, number):
    return store / f"records/shard={shard:04d}/slice={number:02d}/part-00000.parquet"


# --- a store that is as it should be --------------------------------------------------------------------


def test_a_sound_store_answers_with_these_fields(cli, store):
    before = content(store)
    answer = cli.json("verify", "--store", "store")
    assert_fields(answer, FOUND)
    assert answer.keys() == documented("verify")
    assert (answer["ok"], answer["problems"], answer["stages_checked"], answer["stages_replayed"]) == (True, [], 6, 0)
    assert (answer["comparison"], answer["replayed_shards"], answer["workers"]) == ("none", [], [])
    assert answer["fingerprint"]["device"] == "cpu"
    assert content(store) == before
    assert cli("verify", "--store", "store").out == "6 stages checked, none retrained (--replay)\nok\n"


def test_a_replay_counts_what_it_retrained(cli, store):
    before = content(store)
    everything = cli.json("verify", "--store", "store", "--replay", "all")
    assert (everything["ok"], everything["stages_replayed"], everything["replayed_shards"]) == (True, 6, [0, 1, 2])
    assert (everything["comparison"], len(everything["workers"])) == ("bitwise", 1)
    some = cli.json("verify", "--store", "store", "--replay", "2")
    assert (some["stages_replayed"], len(set(some["replayed_shards"]))) == (4, 2)
    assert cli.json("verify", "--store", "store", "--replay", "99")["stages_replayed"] == 6
    assert (
        "6 stages checked, 6 retrained from nothing (bitwise)\nok\n"
        in cli("verify", "--store", "store", "--replay", "all").out
    )
    assert content(store) == before


def test_a_store_whose_repair_is_due_is_sound(cli, store):
    kept, *_ = households(store, held_out=False)
    request = cli.json("delete", "--store", "store", "--subject", kept, "--defer")["request"]
    answer = cli.json("verify", "--store", "store", "--replay", "all")
    assert (answer["ok"], answer["open_requests"]) == (True, [request])
    cli.json("repair", "--store", "store")
    assert cli.json("verify", "--store", "store", "--replay", "all")["ok"]


# --- a store that isn't ----------------------------------------------------------------------------------

TAMPERED = {
    "a flipped bit of a stage": (lambda s: flipped(stage(s, 1, 2) / "state/c.0"), r"stage 2 of shard 1 is damaged: state/c\.0"),
    "a lost chunk": (lambda s: (stage(s, 0, 1) / "state/c.0").unlink(), r"stage 1 of shard 0 .*c\.0"),
    "a lost stage": (lambda s: shutil.rmtree(stage(s, 2, 1)), r"stage 1 of shard 2"),
    "a stage too many": (lambda s: shutil.copytree(stage(s, 0, 1), stage(s, 0, 1).with_name("stage-01-" + "0" * 64 + ".0123456789ab")), r"shard 0, stage 1: a checkpoint that the ledger doesn't know"),
    "a flipped bit of the rows": (lambda s: flipped(rows(s, 1, 1), at=60), r"shard=0001/slice=01/part-00000\.parquet' is damaged"),
    "lost rows": (lambda s: rows(s, 0, 2).unlink(), r"shard 0, slice 2: 0 rows, not the \d+ that the ledger expects"),
    "rows of another slice": (lambda s: shutil.copy(rows(s, 0, 1), rows(s, 0, 2)), r"shard 0, slice 2: \d+ rows"),
    "a stray file": (lambda s: (s / "notes.txt").write_text("x"), r"^notes\.txt: nobody answers for this file"),
    "a stray file among the rows": (lambda s: (s / "records/notes.txt").write_text("x"), r"^records/notes\.txt: unknown file"),
    "a key that others can read": (lambda s: (s / "keys/routing.key").chmod(0o644), r"^keys/routing\.key: mode is 0644, expected 0600"),
}  # fmt: skip


@pytest.mark.parametrize("name", TAMPERED)
def test_tampering_is_listed_with_its_place(cli, store, name):
    tamper, place = TAMPERED[name]
    tamper(store)
    answer = cli.json("verify", "--store", "store", code=1)
    assert_fields(answer, FOUND)
    assert answer["ok"] is False
    assert any(re.search(place, problem) for problem in answer["problems"]), answer["problems"]
    said = cli("verify", "--store", "store")
    assert said.code == 1
    assert all(f"  problem: {problem}\n" in said.out for problem in answer["problems"])
    assert re.search(r"FAILED: \d+ problems?\n$", said.out)


UNOPENABLE = {
    "an edited recipe": (lambda s: edited(s, "epochs: 2", "epochs: 3"), "recipe.yaml of the store was edited after training"),
    "a recipe that is none": (lambda s: (s / "recipe.yaml").write_text("{"), "recipe.yaml of the store"),
    "a lost routing key": (lambda s: (s / "keys/routing.key").unlink(), "keys/routing.key of the store is missing or unreadable"),
    "a lost exclusion key": (lambda s: (s / "keys/exclusion.key").unlink(), "keys/exclusion.key of the store is missing or unreadable"),
    "lost keys": (lambda s: shutil.rmtree(s / "keys"), "keys/routing.key of the store is missing or unreadable"),
    "a lost ledger": (lambda s: (s / "ledger.db").unlink(), "the store's ledger (ledger.db) is missing"),
    "a ledger that is none": (lambda s: (s / "ledger.db").write_text("hello" * 100), "ledger.db) can't be used: file is not a database"),
    "an empty ledger": (lambda s: (s / "ledger.db").write_bytes(b""), "ledger.db"),
}  # fmt: skip


def edited(store, old, new):
    text = (store / "recipe.yaml").read_text()
    assert old in text
    (store / "recipe.yaml").write_text(text.replace(old, new))


@pytest.mark.parametrize("name", UNOPENABLE)
def test_a_store_that_can_not_be_opened_says_why_in_every_command(cli, store, name):
    tamper, message = UNOPENABLE[name]
    tamper(store)
    before = content(store)
    for verb, words in VERBS.items():
        failure = cli.refused(verb, *(["--store", "store"] if verb != "train" else []), *words, code=3)
        assert message in failure.message
        assert "estore" in failure.hint
    answer = cli.json("verify", "--store", "store", code=1)
    assert_fields(answer, FOUND)
    assert not answer["ok"]
    assert message in answer["problems"][0]
    said = cli("verify", "--store", "store")
    assert (said.code, "FAILED: 1 problem\n" in said.out) == (1, True)
    assert said.err.startswith("hint: ")
    assert content(store) == before


def test_lost_rows_are_no_unknown_records(cli, store):
    kept, *_ = households(store, held_out=False)
    shard, slice_ = place_of(store, kept)
    rows(store, shard, slice_).unlink()
    before = content(store)
    for more in ([], ["--ignore-missing"]):
        failure = cli.refused("delete", "--store", "store", "--record", f"p{2 * int(kept[1:]):03d}", *more, code=3)
        assert f"slice {slice_} of shard {shard} has 0 rows on disk" in failure.message
        assert "nothing was changed" in failure.message
        assert "estore" in failure.hint
    assert content(store) == before


def test_lost_rows_are_no_new_rows(cli, store):
    shutil.rmtree(store / "records")
    failure = cli.refused("train", "recipe.yaml", code=3)
    assert "are not those that the ledger expects" in failure.message


def test_damaged_rows_keep_nobody_in_service(cli, store):
    kept, *_ = households(store, held_out=False)
    flipped(rows(store, *place_of(store, kept)), at=60)
    failure = cli.refused("delete", "--store", "store", "--subject", kept, code=3)
    assert "is accepted and no prediction uses" in failure.message
    assert "is damaged" in failure.message
    (request,) = cli.json("status", "--store", "store")["requests"]
    assert request["state"] == "accepted"


def test_a_damaged_stage_is_refused_and_healed(cli, store):
    flipped(stage(store, 1, 2) / "state/c.0")
    assert "stage 2 of shard 1 is damaged" in cli.refused("train", "recipe.yaml", code=3).message
    papq.write_table(people(), cli.folder / "people.parquet")
    failure = cli.refused("predict", "--store", "store", "people.parquet", "--output", "out.parquet", code=3)
    assert "stage 2 of shard 1 is damaged" in failure.message
    assert "sisa repair" in failure.hint
    before = cli.json("status", "--store", "store")["constituents"]
    answer = cli.json("repair", "--store", "store")
    assert (answer["stages_retrained"], answer["shards"], answer["requests"]) == (1, [1], [])
    assert cli.json("status", "--store", "store")["constituents"] == before
    assert cli.json("verify", "--store", "store", "--replay", "all")["ok"]
    assert cli.json("train", "recipe.yaml")["stages_trained"] == 0


# --- a store that is in use --------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["train", "verify"])
def test_a_store_in_use_is_refused_with_who_holds_it(cli, store, verb):
    with FileLock(store / "locks" / "operation.lock").held():
        words = ["recipe.yaml"] if verb == "train" else ["--store", "store"]
        failure = cli.refused(verb, *words, code=3)
        assert re.search(r"another operation holds the store \(process \d+", failure.message)
        assert "Wait" in failure.hint


def test_a_deletion_is_accepted_while_the_store_is_in_use(cli, store):
    kept, *_ = households(store, held_out=False)
    with FileLock(store / "locks" / "operation.lock").held():
        answer = cli.json("delete", "--store", "store", "--subject", kept, "--defer")
        assert answer["state"] == "stages_purged"
        assert cli.json("status", "--store", "store")["state"] == "repair due"
        papq.write_table(people(), cli.folder / "people.parquet")
        assert cli.json("predict", "--store", "store", "people.parquet", "--output", "out.parquet")["version"] == 2
