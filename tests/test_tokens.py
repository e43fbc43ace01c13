"""Tokens: what the ledger keeps of them, and ``sisa token``."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import shlex
import subprocess
import sys

import click
import pytest
from cli_kit import ROOT, Cli, documented, one_object, process, surroundings, trained

import sisa
from sisa.cli import main
from sisa.errors import BusyError, UserError
from sisa.ledger import SCOPES, Ledger, tokens

FORM = re.compile(r"sisa_([0-9a-f]{16})_([A-Za-z0-9_-]{43})")


@pytest.fixture
def ledger(place):
    made = Ledger.create(place)
    yield made
    made.close()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("tokens"))


@pytest.fixture
def cli(capsys, monkeypatch, tmp_path, store):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "store").symlink_to(store)
    return Cli(capsys)


def test_a_token_is_found_by_its_whole_text_and_nothing_else(ledger):
    text, token = ledger.tokens.create(["read", "predict", "read"], name="shop")
    form = FORM.fullmatch(text)
    assert (form[1], token.scopes, token.name, token.last_used_on) == (token.id, ("predict", "read"), "shop", None)
    assert ledger.tokens.find(text) == token
    if ledger.database.remote:  # an event loop doesn't ask over a network
        with pytest.raises(BusyError):
            ledger.tokens.find(text, wait=False)
    else:
        assert ledger.tokens.find(text, wait=False) == token
    other, _ = ledger.tokens.create(["admin"])
    flipped = text[:-2] + ("A" if text[-2] != "A" else "B") + text[-1]
    crossed = f"sisa_{form[1]}_{FORM.fullmatch(other)[2]}"
    unknown = f"sisa_{'0' * 16}_{form[2]}"
    for wrong in ("", text[:-1], text + "A", text + "\n", f" {text}", text.upper(), form[2], flipped, crossed, unknown):
        assert ledger.tokens.find(wrong) is None


def test_a_token_is_compared_in_constant_time_whether_its_id_is_known_or_not(ledger, monkeypatch):
    text, token = ledger.tokens.create(["read"])
    secret = FORM.fullmatch(text)[2]
    wrong, unknown = f"sisa_{token.id}_{secret[::-1]}", f"sisa_{'0' * 16}_{secret}"
    digest = {each: hashlib.sha256(each.encode()).digest() for each in (text, wrong, unknown)}
    compared, say = [], []

    def compare_digest(one, other):
        compared.append((one, other))
        return say[-1] if say else compare(one, other)

    compare = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", compare_digest)
    assert [ledger.tokens.find(each) for each in (text, wrong, unknown)] == [token, None, None]
    assert compared == [
        (digest[text], digest[text]),
        (digest[wrong], digest[text]),
        (digest[unknown], tokens.NOBODY),  # of the same length: what isn't there takes as long
    ]
    assert len(tokens.NOBODY) == len(digest[text])
    say.append(False)  # nothing else decides
    assert ledger.tokens.find(text) is None
    say.append(True)
    assert [ledger.tokens.find(each) for each in (wrong, unknown)] == [token, None]


def test_neither_the_text_nor_its_secret_lies_in_the_ledger(ledger, tmp_path):
    made = [ledger.tokens.create([scope])[0] for scope in SCOPES]
    ledger.tokens.revoke(made[0])
    ledger.close()
    content = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert not [text for text in made if FORM.fullmatch(text)[2].encode() in content]


def test_no_two_tokens_are_alike(ledger):
    made = [ledger.tokens.create(["read"])[0] for _ in range(50)]
    assert len({FORM.fullmatch(text)[1] for text in made}) == len({FORM.fullmatch(text)[2] for text in made}) == 50


def test_admin_allows_everything_and_the_others_only_themselves(ledger):
    allowed = {scope: ledger.tokens.create([scope])[1] for scope in SCOPES}
    for name, token in allowed.items():
        assert {scope for scope in SCOPES if token.allows(scope)} == (set(SCOPES) if name == "admin" else {name})


def test_a_revoked_token_is_gone_for_every_reader_at_once(ledger, place):
    text, token = ledger.tokens.create(["read"])
    reader = Ledger.open(place)
    assert reader.tokens.find(text) == token
    assert ledger.tokens.revoke(token.id) == token
    assert reader.tokens.find(text) is None
    assert reader.tokens.all() == []
    reader.close()
    with pytest.raises(UserError, match="no such token"):
        ledger.tokens.revoke(token.id)


def test_making_and_revoking_is_history(ledger):
    _, token = ledger.tokens.create(["delete", "read"])
    ledger.tokens.revoke(token.id)
    assert [(event["kind"], event["token"]) for event in ledger.events()] == [
        ("token_created", token.id), ("token_revoked", token.id)
    ]  # fmt: skip
    assert ledger.events()[0]["scopes"] == ["delete", "read"]


def test_the_first_use_of_a_day_is_remembered(ledger, monkeypatch):
    text, token = ledger.tokens.create(["read"])
    ledger.tokens.used(token)
    used = ledger.tokens.find(text)
    assert (used.last_used_on, used.used_today) == (token.created_at[:10], True)
    writes = []
    monkeypatch.setattr(ledger.database, "transaction", lambda: writes.append(1))
    ledger.tokens.used(used)
    assert writes == []


def test_a_ledger_with_tokens_verifies(cli):
    cli.json("token", "create", "--store", "store", "--scope", "read")
    answer = cli.json("verify", "--store", "store")
    assert (answer["ok"], answer["problems"]) == (True, [])


def test_create_prints_the_token_alone_and_says_that_it_is_shown_only_now(cli):
    said = cli("token", "create", "--store", "store", "--scope", "predict,delete", "--name", "web shop")
    form = FORM.fullmatch(said.out.strip())
    assert said.code == 0
    assert f"token {form[1]} for predict, delete: shown only now" in said.err
    assert form[2] not in said.err


def test_create_answers_programs(cli):
    said = cli("token", "create", "--store", "store", "--scope", "read", "--scope", "predict", "--json")
    answer = one_object(said.out)
    assert list(answer) == ["token", "id", "scopes"]
    assert answer.keys() == documented("token")
    assert (answer["scopes"], FORM.fullmatch(answer["token"])[1]) == (["predict", "read"], answer["id"])
    assert "shown only now" in said.err


def test_list_shows_everything_but_the_token(cli):
    made = cli.json("token", "create", "--store", "store", "--scope", "admin", "--name", "the operator")
    listed = cli.json("token", "list", "--store", "store")["tokens"]
    (entry,) = [entry for entry in listed if entry["id"] == made["id"]]
    assert {**entry, "created_at": ""} == {
        "id": made["id"], "scopes": ["admin"], "name": "the operator", "created_at": "", "last_used_on": None
    }  # fmt: skip
    said = cli("token", "list", "--store", "store")
    (line,) = [line for line in said.out.splitlines() if made["id"] in line]
    assert all(word in line for word in ("admin", "the operator", entry["created_at"][:10], "never used"))
    assert FORM.fullmatch(made["token"])[2] not in said.out + json.dumps(listed)


@pytest.mark.parametrize("by", ["id", "token"])
def test_revoke_takes_the_id_or_the_token_that_leaked(cli, store, by):
    made = cli.json("token", "create", "--store", "store", "--scope", "read")
    said = cli("token", "revoke", "--store", "store", made[by])
    assert (said.code, said.out) == (0, f"token {made['id']} opens nothing any more\n")
    opened = sisa.open_store(store)
    assert opened.opened.ledger.tokens.find(made["token"]) is None
    opened.close()
    failure = cli.refused("token", "revoke", "--store", "store", made[by])
    assert failure.message == f"token {made['id']}: the store has no such token"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["create", "--scope", "predcit"], "scope 'predcit': expected predict, delete, read or admin (did you mean 'predict'?)"),
        (["create", "--scope", "read,remove"], "scope 'remove': expected predict, delete, read or admin"),
        (["create", "--scope", "READ"], "scope 'READ': expected predict, delete, read or admin"),
        (["create", "--scope", " , "], "expected at least one scope"),
        (["create", "--scope", "read", "--name", "a\x1b[31m"], "expected printable text"),
        (["create"], "Missing option '--scope'."),
        (["creat"], "No such command 'creat'. Did you mean 'create'?"),
        (["revoke"], "Missing argument 'ID'."),
    ],
)  # fmt: skip
def test_what_is_refused(cli, words, message):
    more = ["--store", "store"] if words[0] != "creat" else []
    assert message in cli.refused("token", *words, *more).message


def test_a_broken_token_is_not_repeated(cli):
    made = cli.json("token", "create", "--store", "store", "--scope", "read")
    failure = cli.refused("token", "revoke", "--store", "store", made["token"][:-1])
    assert FORM.fullmatch(made["token"])[2][:20] not in failure.message + failure.hint


def test_no_store(cli):
    assert "no store there" in cli.refused("token", "list", "--store", "nowhere").message


@pytest.mark.parametrize("words", [["token"], ["token", "create"], ["token", "list"], ["token", "revoke"]])
def test_help_imports_nothing_heavy_and_shows_examples_that_parse(cli, words):
    heavy = ["torch", "ray", "numpy", "pyarrow", "zarr", "pydantic", "sqlite3", "fastapi"]
    code = f"import sys; from sisa.cli.main import run; c = run({[*words, '--help']}); "
    code += f"print([m for m in {heavy} if m in sys.modules], file=sys.stderr); sys.exit(c)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=surroundings(), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr.strip()) == (0, "[]")
    assert "\\b" not in done.stdout
    assert done.stdout == cli(*words, "-h").out
    lines = [line.strip() for line in done.stdout.splitlines() if line.startswith("    sisa ")]
    assert lines
    for line in lines:
        _, group, verb, *rest = shlex.split(line.partition(" >")[0])
        assert group == "token"
        parent = click.Context(main.cli.commands["token"], info_name="sisa token", **main.cli.context_settings)
        with main.cli.commands["token"].commands[verb].make_context(verb, rest, parent=parent) as context:
            assert context.params


def test_a_shell_gets_the_token_from_stdout(tmp_path, store):
    made = process("token", "create", "--store", str(store), "--scope", "read", folder=tmp_path)
    assert FORM.fullmatch(made.stdout.removesuffix("\n"))


def test_a_lookup_that_is_remembered_ends_with_the_next_commit_of_anybody(tmp_path):
    ledger = Ledger.create(tmp_path / "ledger.db")
    other = Ledger.open(tmp_path / "ledger.db")
    text, made = other.tokens.create(["predict"])
    assert ledger.tokens.find(text, wait=False) == made
    assert ledger.tokens.find(text, wait=False) == made
    other.tokens.revoke(made.id)
    assert ledger.tokens.find(text, wait=False) is None
    text, made = ledger.tokens.create(["read"])
    assert ledger.tokens.find(text, wait=False) == made
    ledger.tokens.revoke(made.id)
    assert ledger.tokens.find(text, wait=False) is None
    for each in (ledger, other):
        each.close()
