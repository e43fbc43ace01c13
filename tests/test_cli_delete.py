"""``sisa delete`` and ``sisa repair``: whom a request is about, what is answered, and when nothing is changed."""

from __future__ import annotations

import re
import shutil
import sys
import unicodedata

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as papq
import pytest
from cli_kit import (
    CLASSES,
    DELETION,
    Cli,
    assert_fields,
    changed,
    content,
    documented,
    households,
    one_object,
    people,
    place_of,
    trained,
)

ODD = [
    "a b", " lead", "trail ", "two\nlines", "quo'te", 'dou"ble', "\u00fcn\u00ef", "e\u0301", "-7", "-x", "--defer", "--odd",
    "\U0001f642", "tab\tx", "../../etc/passwd", "a;b", "%s", "$HOME", "#hash", "a,b", "sep\u2028x", "\\", "*", "[0]",
]  # fmt: skip
"""Ids that a shell, a path, a CSV or a parser of options could trip over."""
OWN_ROWS = {
    "source": "people.parquet", "record_id": "person", "label": "income", "classes": CLASSES,
    "features": ["age", "hours", "job"],
}  # fmt: skip


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    odd = [*ODD, *(f"p{i:03d}" for i in range(len(ODD), 60))]
    return {
        "people": trained(folder / "people"),
        "odd": trained(folder / "odd", changed(people(), person=odd).drop_columns(["household"]), data=OWN_ROWS | {"subject_id": None, "holdout": {}}),
        "numbers": trained(folder / "numbers", changed(people(), person=list(range(-30, 30))), data=OWN_ROWS | {"subject_id": None, "holdout": {}}),
    }  # fmt: skip


@pytest.fixture
def cli(capsys, monkeypatch, tmp_path, stores):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name, store in stores.items():
        shutil.copytree(store, tmp_path / name)
    return Cli(capsys)


@pytest.fixture
def kept(stores):
    """Households that are trained on."""
    return households(stores["people"], held_out=False)


@pytest.fixture
def held_out(stores):
    return households(stores["people"], held_out=True)


def unchanged(cli, name, *words):
    """Delete; it must be refused, and not a byte may change."""
    before = content(cli.folder / name)
    failure = cli.refused("delete", "--store", name, *words)
    assert content(cli.folder / name) == before
    return failure


# --- what is answered ---------------------------------------------------------------------------------


def test_a_deletion_answers_with_these_fields(cli, kept):
    answer = cli.json("delete", "--store", "people", "--subject", kept[0], "--reason", "ticket 1")
    assert_fields(answer, DELETION)
    assert answer.keys() == documented("delete")
    shard, slice_ = place_of(cli.folder / "people", kept[0])
    assert REQUEST.fullmatch(answer["request"])
    assert (answer["state"], answer["subjects"], answer["records"]) == ("repaired", 1, 2)
    assert (answer["missing"], answer["shards"], answer["stages_retrained"]) == ([], [shard], 3 - slice_)
    assert [answer[f"version_{when}"] for when in ("before", "quarantine", "after")] == [1, 2, 3]
    assert 0 < answer["seconds_to_quarantine"] <= answer["seconds"]
    assert (answer["repeated"], answer["note"]) == (False, "")


REQUEST = re.compile(r"del-[0-9a-f]{16}")


def test_words_of_a_deletion(cli, kept):
    said = cli("delete", "--store", "people", "--subject", *kept[:2])
    request = cli.json("status", "--store", "people")["requests"][0]["request"]
    assert said.err == f"accepted as {request}: no prediction uses these rows any more\n"
    first, second, third = said.out.splitlines()
    assert first == f"{request}: 4 records of 2 subjects deleted"
    assert re.fullmatch(r"out of service after 0\.\d{3} s \(version 2\)", second)
    assert re.fullmatch(
        r"retrained \d stages? of shards? [012, ]+; live again as version 3 \(\d+\.\d s in all\)", third
    )
    again = cli("delete", "--store", "people", "--subject", kept[0])
    assert again.err == f"asked for before, as {request}: no prediction uses these rows any more\n"
    assert again.out.startswith(f"asked before: {request}: ")


def test_a_deferred_deletion_and_its_repair(cli, kept):
    one = cli.json("delete", "--store", "people", "--subject", kept[0], "--defer")
    assert_fields(one, DELETION)
    assert (one["state"], one["version_quarantine"], one["version_after"], one["stages_retrained"]) == (
        "stages_purged",
        2,
        None,
        0,
    )
    two = cli.json("delete", "--store", "people", "--record", "p030", "--defer")
    assert "sisa repair" in cli("delete", "--store", "people", "--subject", kept[-1], "--defer").out
    answer = cli.json("repair", "--store", "people")
    assert_fields(answer, {**DELETION, "requests": [str]})
    assert answer.keys() == (documented("delete") - {"repeated", "note"}) | documented("repair")
    assert answer["requests"][:2] == [one["request"], two["request"]]
    assert (answer["request"], answer["state"], len(answer["requests"])) == (one["request"], "repaired", 3)
    assert (answer["records"], answer["version_before"], answer["version_after"]) == (5, 4, 5)
    requests = cli.json("status", "--store", "people")["requests"]
    assert [(r["state"], r["version_after"]) for r in requests] == [("repaired", 5)] * 3
    assert {shard for r in requests for shard in r["shards"]} == set(answer["shards"])


def test_a_repair_with_nothing_to_do(cli):
    answer = cli.json("repair", "--store", "people")
    assert_fields(answer, {**DELETION, "requests": [str]})
    assert (answer["requests"], answer["request"], answer["stages_retrained"]) == ([], "", 0)
    assert (answer["version_before"], answer["version_quarantine"], answer["version_after"]) == (1, None, 1)
    assert cli("repair", "--store", "people").out == "nothing to repair (version 1)\n"


def test_a_repeated_deletion_names_the_first_request(cli, kept):
    first = cli.json("delete", "--store", "people", "--subject", kept[0], "--defer")
    again = cli.json("delete", "--store", "people", "--subject", kept[0], "--defer")
    assert (again["request"], again["repeated"], again["version_after"]) == (first["request"], True, None)
    after = cli.json("delete", "--store", "people", "--subject", kept[0])
    assert (after["request"], after["state"], after["version_after"]) == (first["request"], "repaired", 3)
    before = content(cli.folder / "people")
    last = cli.json("delete", "--store", "people", "--subject", kept[0])
    assert (last["request"], last["repeated"], last["records"]) == (first["request"], True, 2)
    assert content(cli.folder / "people") == before
    assert len(cli.json("status", "--store", "people")["requests"]) == 1


def test_a_record_of_a_person_deleted_before_names_the_first_request(cli, kept):
    first = cli.json("delete", "--store", "people", "--subject", kept[0], "--defer")
    member = f"p{2 * int(kept[0][1:]):03d}"
    assert cli.json("delete", "--store", "people", "--record", member, "--defer")["request"] == first["request"]


def test_some_new_some_deleted_before_makes_a_request_of_the_new(cli, kept):
    first = cli.json("delete", "--store", "people", "--subject", kept[0], "--defer")
    second = cli.json("delete", "--store", "people", "--subject", *kept[:2], "--defer")
    assert second["request"] != first["request"]
    assert (second["repeated"], second["subjects"], second["records"]) == (False, 1, 2)


def test_a_record_goes_alone_and_a_subject_with_everything(cli, kept):
    member = 2 * int(kept[0][1:])
    one = cli.json("delete", "--store", "people", "--record", f"p{member:03d}", "--defer")
    assert (one["subjects"], one["records"]) == (1, 1)
    rest = cli.json("delete", "--store", "people", "--subject", kept[0], "--defer")
    assert (rest["subjects"], rest["records"], rest["repeated"]) == (1, 1, False)
    unchanged(cli, "people", "--subject", f"p{member + 2:03d}")
    unchanged(cli, "people", "--record", kept[1])


def test_only_held_out_rows(cli, held_out):
    answer = cli.json("delete", "--store", "people", "--subject", *held_out[:2])
    assert_fields(answer, DELETION)
    assert (answer["state"], answer["records"], answer["shards"], answer["stages_retrained"]) == ("repaired", 4, [], 0)
    assert (answer["version_before"], answer["version_quarantine"], answer["version_after"]) == (1, None, 1)
    status = cli.json("status", "--store", "people")
    assert (status["version"], status["holdout_records"]) == (1, 2 * len(held_out) - 4)
    assert cli("delete", "--store", "people", "--subject", held_out[2], "--defer").out.endswith(
        "only held-out rows: no model had seen them, none was retrained\n"
    )


def test_the_last_of_everybody(cli, kept, held_out):
    answer = cli.json("delete", "--store", "people", "--subject", *kept, *held_out)
    assert (answer["state"], answer["subjects"], answer["records"]) == ("repaired", 30, 60)
    status = cli.json("status", "--store", "people")
    assert (status["records"], status["subjects"], [c["stage"] for c in status["constituents"]]) == (0, 0, [0, 0, 0])
    papq.write_table(people(), cli.folder / "input.parquet")
    failure = cli.refused("predict", "--store", "people", "input.parquet", "--output", "out.parquet", code=3)
    assert "no clean constituent is left in version" in failure.message
    assert not (cli.folder / "out.parquet").exists()


# --- ids that aren't there ----------------------------------------------------------------------------


def test_an_unknown_id_changes_nothing(cli, kept):
    failure = unchanged(cli, "people", "--subject", kept[0], "nobody", kept[1])
    assert failure.message == "1 of 3 ids are not in the store: 'nobody'; nothing was changed"
    assert "--ignore-missing" in failure.hint


def test_many_unknown_ids_are_counted_and_some_named(cli):
    failure = unchanged(cli, "people", "--subject", *(f"x{i}" for i in range(8)))
    assert failure.message == "8 of 8 ids are not in the store: 'x0', 'x1', 'x2', 'x3', 'x4', ...; nothing was changed"


def test_unknown_ids_are_skipped_if_that_is_wanted(cli, kept):
    words = ["delete", "--store", "people", "--subject", "nobody", kept[0], "no\u00efr", "--ignore-missing", "--defer"]
    answer = cli.json(*words)
    assert (answer["missing"], answer["records"]) == (["nobody", "no\u00efr"], 2)
    assert "2 ids not in the store\n" in cli(*words).out


def test_only_unknown_ids_to_skip_are_nothing_to_do(cli):
    words = ["delete", "--store", "people", "--subject", "nobody", "none", "--ignore-missing"]
    before = cli.json("status", "--store", "people")
    answer = cli.json(*words)
    assert_fields(answer, DELETION)
    assert answer.keys() == documented("delete")
    assert (answer["request"], answer["missing"], answer["records"]) == ("", ["nobody", "none"], 0)
    assert answer["version_before"] == answer["version_after"] == before["version"]
    assert cli(*words).out == "nothing to delete: none of 2 ids is in the store; nothing was changed\n"
    assert cli.json("status", "--store", "people") == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "expected exactly one of --subject, --record and --from"),
        (["--subject", "h001", "--record", "p001"], "expected exactly one of --subject, --record and --from"),
        (["--subject", "h001", "--from", "ids.txt"], "expected exactly one of --subject, --record and --from"),
        (["--subject", ""], "an id is empty"),
        (["--subject", "\udcff"], "an id is not valid Unicode text"),
        (["--subject", "h001", "--reason", "r", "stray"], "Got unexpected extra argument (stray)"),
        (["--subject", "--defer"], "--subject: expected an id, got the option --defer (if that is an id, write --subject=--defer)"),
        (["h001"], "Got unexpected extra argument (h001)"),
        (["--subject", "h001", "--reason", "\udcff"], "Invalid value for '--reason': not valid Unicode text"),
    ],
)  # fmt: skip
def test_a_request_that_names_nobody(cli, words, message):
    assert message in unchanged(cli, "people", *words).message


# --- ids of every kind --------------------------------------------------------------------------------


def test_several_ids_after_one_option_and_after_several(cli, kept):
    words = ["--subject", kept[0], kept[1], "--defer", "--subject", kept[2], f"--subject={kept[3]}"]
    assert cli.json("delete", *words, "--store", "people")["subjects"] == 4


def test_negative_numbers_are_ids(cli):
    answer = cli.json("delete", "--store", "numbers", "--subject", "-30", "7", "-2", "0", "--record", "-1", code=2)
    assert "exactly one" in answer["error"]["message"]
    answer = cli.json("delete", "--store", "numbers", "--subject", "-30", "7", "-2", "0", "--defer")
    assert (answer["subjects"], answer["records"]) == (4, 4)
    assert cli.json("delete", "--store", "numbers", "--record", "-1", "--defer")["records"] == 1
    failure = unchanged(cli, "numbers", "--subject", "007", "+5", "1.0", "-0")
    assert failure.message.startswith("4 of 4 ids are not in the store: '007', '+5', '1.0', '-0'")


@pytest.mark.parametrize("given", ODD)
def test_an_odd_id_is_found_as_it_was_typed(cli, given):
    words = ["--subject", given] if given != "--defer" else [f"--subject={given}"]
    answer = cli.json("delete", "--store", "odd", *words, "--defer")
    assert (answer["subjects"], answer["records"], answer["missing"]) == (1, 1, [])


def test_an_id_may_be_composed_in_another_way(cli):
    composed = unicodedata.normalize("NFC", "e\u0301")
    answer = cli.json("delete", "--store", "odd", "--subject", composed, "e\u0301", "--defer")
    assert answer["records"] == 1


def test_odd_ids_all_at_once_leave_nothing_behind(cli):
    words = [
        word for given in ODD for word in ([f"--subject={given}"] if given.startswith("--") else ["--subject", given])
    ]
    assert cli.json("delete", "--store", "odd", *words)["records"] == len(ODD)
    found = cli.json("verify", "--store", "odd")
    assert (found["ok"], found["problems"]) == (True, [])
    assert not [path for path in (cli.folder / "odd").rglob("*") if "passwd" in path.name]


# --- ids from a file ----------------------------------------------------------------------------------


def given(cli, name, ids):
    """Write ids the way the name says."""
    path = cli.folder / name
    if name.endswith(".txt"):
        path.write_bytes(ids)
    elif name.endswith(".csv"):
        pacsv.write_csv(ids, path)
    else:
        papq.write_table(ids, path)
    return path


@pytest.mark.parametrize(
    ("name", "ids", "records"),
    [
        ("lines.txt", b"-30\n\n-29\n5\n5\n", 3),
        ("windows.txt", b"\xef\xbb\xbf-30\r\n-29\r\n", 2),
        ("no-end.txt", b"-30", 1),
        ("ids.parquet", pa.table({"person": [-30, 3, 3]}), 2),
        ("texts.parquet", pa.table({"extra": [1, 2], "person": ["-30", "3"]}), 2),
        ("ids.csv", pa.table({"extra": [1, 2], "person": [-30, 3]}), 2),
    ],
)
def test_ids_from_a_file(cli, name, ids, records):
    answer = cli.json("delete", "--store", "numbers", "--from", given(cli, name, ids), "--defer")
    assert (answer["records"], answer["missing"]) == (records, [])


def test_a_table_names_people_if_it_can_and_else_records(cli, kept):
    member = f"p{2 * int(kept[0][1:]):03d}"
    only = given(cli, "records.parquet", pa.table({"person": [member]}))
    assert cli.json("delete", "--store", "people", "--from", only, "--defer")["records"] == 1
    both = given(cli, "both.parquet", pa.table({"person": [member], "household": [kept[0]]}))
    assert cli.json("delete", "--store", "people", "--from", both, "--defer")["records"] == 1  # the other one
    lines = given(cli, "people.txt", f"{kept[1]}\n".encode())
    assert cli.json("delete", "--store", "people", "--from", lines, "--defer")["records"] == 2


def test_a_line_ends_where_lines_end(cli):
    answer = cli.json(
        "delete", "--store", "odd", "--from", given(cli, "ids.txt", "sep\u2028x\na b\n".encode()), "--defer"
    )
    assert answer["records"] == 2


@pytest.mark.parametrize(
    ("name", "ids", "message", "hint"),
    [
        ("empty.txt", b"", "--from 'empty.txt' holds no id", "one id per line"),
        ("blank.txt", b"\n\r\n", "--from 'blank.txt' holds no id", "one id per line"),
        ("binary.txt", b"\xff\x00\x01", "--from 'binary.txt' can't be read: it is neither a table nor UTF-8 text", "one id per line"),
        ("none.parquet", pa.table({"person": pa.array([], pa.int64())}), "--from 'none.parquet' holds no id", "one id per line"),
        ("null.parquet", pa.table({"person": [1, None]}), "--from 'null.parquet': column 'person': 1 of 2 ids are missing", "Mend"),
        ("float.parquet", pa.table({"person": [1.5]}), "--from 'float.parquet': column 'person': an id can't be of type double", "Mend"),
        ("other.parquet", pa.table({"persn": [1]}), "--from 'other.parquet' has no column 'person' (did you mean 'persn'?); it has 'persn'", "as the recipe does"),
        ("other.csv", pa.table({"x": [1], "y": [2]}), "--from 'other.csv' has no column 'person'; it has 'x', 'y'", "as the recipe does"),
        ("unknown.csv", pa.table({"person": [1, 99]}), "1 of 2 ids are not in the store: '99'; nothing was changed", "--ignore-missing"),
    ],
)  # fmt: skip
def test_a_file_of_ids_that_can_not_be_used(cli, name, ids, message, hint):
    given(cli, name, ids)
    failure = unchanged(cli, "numbers", "--from", name)
    assert failure.message == message or failure.message.startswith(message + ";")
    assert hint in failure.hint


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("absent.txt", "--from 'absent.txt' can't be read: No such file or directory"),
        (".", "--from '.' can't be read: Is a directory"),
        ("half.parquet", "--from 'half.parquet' can't be read: it is damaged"),
        ("zero.csv", "--from 'zero.csv' is an empty file"),
    ],
)
def test_a_file_of_ids_that_is_none(cli, path, message):
    (cli.folder / "half.parquet").write_bytes(b"PAR1 and no more")
    (cli.folder / "zero.csv").touch()
    assert unchanged(cli, "numbers", "--from", path).message.startswith(message)


def test_stdout_is_one_object_while_stderr_says_what_goes_on(cli, kept):
    said = cli("delete", "--store", "people", "--json", "--subject", kept[0])
    assert one_object(said.out)["state"] == "repaired"
    assert said.err.startswith("accepted as del-")


def test_with_no_ids_unknown_ones_are_counted(cli, kept):
    for words in (["--subject", "nobody"], ["--subject", "nobody", kept[0]]):
        failure = cli.refused("delete", "--store", "people", *words, "--no-ids")
        assert failure.message == "1 id is not in the store; nothing was changed"
    answer = cli.json("delete", "--store", "people", "--subject", "nobody", "--ignore-missing", "--no-ids")
    assert answer["missing"] is None
    assert cli.json("delete", "--store", "people", "--subject", "nobody", "--ignore-missing")["missing"] == ["nobody"]
