"""Routing: golden routes, the published PRF, one canonical form of an id, and obliviousness."""

from __future__ import annotations

import decimal
import enum
import hashlib
import hmac
import uuid
from fractions import Fraction
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sisa.errors import SourceError, UserError
from sisa.routing import (
    Router,
    StoreKeys,
    canonical_id,
    canonical_ids,
    derive,
    exclusion_digest,
    exclusion_digests,
    id_text,
    new_key,
    parse_key,
    shard_keys,
    siphash_text,
    siphash_words,
)
from sisa.routing import keys as routing_keys
from sisa.routing.siphash import BLOCK

KEY = bytes(range(32))
MASK = 2**64 - 1


def reference_siphash(key: bytes, message: bytes) -> int:
    """SipHash-2-4 as its authors wrote it, one message at a time."""
    k0, k1 = int.from_bytes(key[:8], "little"), int.from_bytes(key[8:], "little")
    v = [k0 ^ 0x736F6D6570736575, k1 ^ 0x646F72616E646F6D, k0 ^ 0x6C7967656E657261, k1 ^ 0x7465646279746573]

    def rotated(value: int, bits: int) -> int:
        return ((value << bits) | (value >> (64 - bits))) & MASK

    def rounds(count: int) -> None:
        for _ in range(count):
            v[0] = (v[0] + v[1]) & MASK
            v[2] = (v[2] + v[3]) & MASK
            v[1], v[3] = rotated(v[1], 13) ^ v[0], rotated(v[3], 16) ^ v[2]
            v[0] = rotated(v[0], 32)
            v[2] = (v[2] + v[1]) & MASK
            v[0] = (v[0] + v[3]) & MASK
            v[1], v[3] = rotated(v[1], 17) ^ v[2], rotated(v[3], 21) ^ v[0]
            v[2] = rotated(v[2], 32)

    whole = len(message) // 8 * 8
    words = [message[i : i + 8] for i in range(0, whole, 8)]
    words.append(message[whole:].ljust(7, b"\0") + bytes([len(message) & 0xFF]))
    for word in words:
        number = int.from_bytes(word, "little")
        v[3] ^= number
        rounds(2)
        v[0] ^= number
    v[2] ^= 0xFF
    rounds(4)
    return v[0] ^ v[1] ^ v[2] ^ v[3]


@pytest.mark.parametrize(
    ("length", "expected"),
    [(0, 0x726FDB47DD0E0E31), (1, 0x74F839C593DC67FD), (8, 0x93F5F5799A932462), (15, 0xA129CA6149BE45E5)],
)
def test_published_vectors(length: int, expected: int) -> None:
    """Vectors of the SipHash paper and its reference code: key 00..0f, message 00..(length-1)."""
    message = bytes(range(length))
    assert reference_siphash(KEY[:16], message) == expected
    assert siphash_text(KEY[:16], pa.array([message.decode()]))[0] == expected
    if length % 8 == 0:
        assert siphash_words(KEY[:16], np.frombuffer(message, "<u8").reshape(1, -1))[0] == expected


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=40), max_size=60), st.binary(min_size=16, max_size=16), st.integers(0, 5))
def test_text_hash_equals_the_reference(texts: list[str], key: bytes, skipped: int) -> None:
    array = pa.array(texts, pa.string()).slice(skipped)
    expected = [reference_siphash(key, text.encode()) for text in texts[skipped:]]
    assert siphash_text(key, array).tolist() == expected


def test_text_hash_over_several_blocks() -> None:
    texts = [f"{i}" * (i % 9) for i in range(BLOCK + 100)]
    hashes = siphash_text(KEY[:16], pa.array(texts))
    for position in [0, 1, 17, BLOCK - 1, BLOCK, BLOCK + 99]:
        assert hashes[position] == reference_siphash(KEY[:16], texts[position].encode())


def test_word_hash_equals_the_reference() -> None:
    words = np.random.default_rng(0).integers(0, 2**64, (50, 4), dtype=np.uint64)
    expected = [reference_siphash(KEY[:16], row.tobytes()) for row in words]
    assert siphash_words(KEY[:16], words).tolist() == expected
    assert siphash_words(KEY[:16], words.T.copy().T).tolist() == expected


def test_hashes_refuse_nulls_and_short_keys() -> None:
    with pytest.raises(ValueError, match="nulls"):
        siphash_text(KEY[:16], pa.array(["a", None]))
    with pytest.raises(ValueError, match="16 bytes"):
        siphash_text(KEY, pa.array(["a"]))
    with pytest.raises(ValueError, match="shape"):
        siphash_words(KEY[:16], np.zeros(3, np.uint64))


def test_golden_routes() -> None:
    """A release that moves these moves everyone's records."""
    router = Router(KEY, shards=7, slices=5, holdout_fraction=0.25)
    people = ["1", "2", "person-3", "\u00e9mile", "a" * 40, "6f9619ff-8b86-d011-b42d-00c04fc964ff"]
    assert [router.route_one(person) for person in people] == [(3, 2), (0, 2), (4, 3), (0, 2), (5, 0), (6, 3)]


def test_golden_keys() -> None:
    assert derive(KEY, "route").hex() == "270d20c872532592eb5c8d126133cffaadc6e439a650aed9bb6b9d6863c2db45"
    keys = shard_keys(KEY, 3)
    assert keys.order.hex() == "ee788bf7868d6e7f42513c438743affd"
    assert keys.digest.hex() == "b01f11319925d17497c02f406bc123ba832f1c27843961e74601398f2f5833da"
    assert exclusion_digest(KEY, "subject", "u1").hex() == "089e27c6e420e225ef829e45c9d4f090"


def test_routes_equal_their_definition() -> None:
    router = Router(KEY, shards=11, slices=4, holdout_fraction=0.3)
    for person in ["", "x", "y", "z", "somebody else"]:
        h = reference_siphash(_subkey("route"), person.encode())
        x = Fraction(h >> 24, 2**40)
        held_out = Fraction(h % 2**24, 2**24) < Fraction(round(0.3 * 2**24), 2**24)
        slice_ = 0 if held_out else 1 + int((x * 11 % 1) * 4)
        assert router.route_one(person) == (int(x * 11), slice_)


def _subkey(*context: str) -> bytes:
    message = b"".join(len(part).to_bytes(8, "little") + part.encode() for part in context)
    return hmac.new(KEY, message, hashlib.sha256).digest()[:16]


def test_survivors_do_not_move_when_others_go() -> None:
    router = Router(KEY, shards=5, slices=3, holdout_fraction=0.2)
    people = [f"p{i}" for i in range(3000)]
    routes = router.route(pa.array(people))
    kept = np.random.default_rng(1).permutation(3000)[:1000]
    again = router.route(pa.array([people[i] for i in kept]))
    assert (again.shard_N == routes.shard_N[kept]).all()
    assert (again.slice_N == routes.slice_N[kept]).all()


def test_routes_are_spread_evenly_and_decisions_are_independent() -> None:
    people = pa.array([str(i) for i in range(40_000)])
    routes = Router(KEY, shards=5, slices=4, holdout_fraction=0.2).route(people)
    assert abs((routes.slice_N == 0).mean() - 0.2) < 0.01
    counts = np.histogram2d(routes.shard_N, routes.slice_N, bins=[5, 5])[0][:, 1:]
    assert abs(counts / 1600 - 1).max() < 0.1
    other = Router(KEY, shards=5, slices=9, holdout_fraction=0.0).route(people)
    assert (other.shard_N == routes.shard_N).all()
    assert other.slice_N.min() == 1
    assert other.slice_N.max() == 9
    fewer = Router(KEY, shards=1, slices=1, holdout_fraction=0.2).route(people)
    assert ((fewer.slice_N == 0) == (routes.slice_N == 0)).all()
    more = Router(KEY, shards=5, slices=4, holdout_fraction=0.4).route(people)
    assert (more.slice_N[routes.slice_N == 0] == 0).all()


def test_another_key_gives_other_routes() -> None:
    people = pa.array([str(i) for i in range(1000)])
    one = Router(KEY, shards=10, slices=1).route(people).shard_N
    two = Router(bytes(32), shards=10, slices=1).route(people).shard_N
    assert 0.02 < (one == two).mean() < 0.2


def test_router_refuses_nonsense() -> None:
    for shards, slices, fraction in [(0, 1, 0.0), (1, 0, 0.0), (1, 1, 1.0), (1, 1, -0.1)]:
        with pytest.raises(ValueError, match="no router"):
            Router(KEY, shards=shards, slices=slices, holdout_fraction=fraction)


_UUID = uuid.UUID("6F9619FF-8B86-D011-B42D-00C04FC964FF")


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (pa.array([7, -3, 0], pa.int64()), ["7", "-3", "0"]),
        (pa.array([7, 255], pa.uint8()), ["7", "255"]),
        (pa.array([2**64 - 1], pa.uint64()), [str(2**64 - 1)]),
        (pa.array(["7", "007", " x"], pa.string()), ["7", "007", " x"]),
        (pa.array(["e\u0301", "\u00e9"], pa.large_string()), ["\u00e9", "\u00e9"]),
        (pa.array(["view"], pa.string_view()), ["view"]),
        (pa.array(["b", "a", "b"]).dictionary_encode(), ["b", "a", "b"]),
        (pa.array([5, 6, 5]).dictionary_encode(), ["5", "6", "5"]),
        (pa.array([_UUID.bytes], pa.uuid()), ["6f9619ff-8b86-d011-b42d-00c04fc964ff"]),
        (pa.chunked_array([["a"], ["b", "c"]]), ["a", "b", "c"]),
        (pa.chunked_array([], pa.int32()), []),
        (pa.array(["skip", "a", "b"]).slice(1), ["a", "b"]),
    ],
)
def test_ids_have_one_text_form(array: pa.Array, expected: list[str]) -> None:
    ids = canonical_ids(array, column="id")
    assert ids.type == pa.string()
    assert ids.to_pylist() == expected


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (pa.array([1.0, 2.0]), "'who': an id can't be of type double"),
        (pa.array([True]), "an id can't be of type bool"),
        (pa.array([b"raw"]), "an id can't be of type binary"),
        (pa.array([1.5]).dictionary_encode(), "an id can't be of type double"),
        (pa.array([["a"]]), "an id can't be of type list"),
        (pa.array([None, None]), "all ids are missing"),
        (pa.array([1, None]), "'who': 1 of 2 ids are missing"),
        (pa.array(["a", None]).dictionary_encode(), "1 of 2 ids are missing"),
        (pa.DictionaryArray.from_arrays([0, 1], pa.array(["a", None])), "ids are missing"),
        (pa.array(["a", "", ""]), "2 of 3 ids are empty"),
        (pa.array(["", "a"]).dictionary_encode(), "1 of 2 ids are empty"),
    ],
)
def test_other_ids_are_refused(array: pa.Array, message: str) -> None:
    with pytest.raises(SourceError, match=message) as caught:
        canonical_ids(array, column="who")
    assert caught.value.exit_code == 2


def test_bytes_that_are_no_text_are_refused() -> None:
    broken = pa.StringArray.from_buffers(1, pa.array([0, 1], pa.int32()).buffers()[1], pa.py_buffer(b"\xff"))
    with pytest.raises(SourceError, match="not valid UTF-8"):
        canonical_ids(broken, column="who")


def test_typed_ids_are_normalised_too() -> None:
    assert canonical_id("e\u0301") == "\u00e9"
    for wrong in ["", "\ud800"]:
        with pytest.raises(UserError):
            canonical_id(wrong)


@pytest.mark.parametrize("pattern", ["{}", "a\u0323{}\u0301", "{}\u0301", "ascii"])
def test_typed_and_read_ids_agree_on_every_code_point(pattern: str) -> None:
    """Libraries know other versions of Unicode; marks that one of them doesn't know are left where they stand."""
    texts = [pattern.format(chr(code)) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    assert canonical_ids(pa.array(texts), column="id").to_pylist() == [canonical_id(text) for text in texts]


def test_ids_are_normalised_wherever_they_stand() -> None:
    """ASCII ids take a short cut; the others of the same column don't."""
    texts = pa.array(["a", "e\u0301", "b", "u\u0308", "\u00e9"])
    assert canonical_ids(texts, column="id").to_pylist() == ["a", "\u00e9", "b", "\u00fc", "\u00e9"]
    assert canonical_ids(texts.slice(1, 3), column="id").to_pylist() == ["\u00e9", "b", "\u00fc"]


class _Name(str, enum.Enum):  # noqa: UP042 - many programs still have such
    ANN = "ann"


@pytest.mark.parametrize(
    ("value", "column", "expected"),
    [
        ("p1", pa.array(["p1"]), "p1"),
        (" a ", pa.array([" a "]), " a "),
        (np.str_("p1"), pa.array(["p1"]), "p1"),
        (_Name.ANN, pa.array(["ann"]), "ann"),
        (-7, pa.array([-7]), "-7"),
        (np.int32(-7), pa.array([-7], pa.int32()), "-7"),
        (np.uint64(2**64 - 1), pa.array([2**64 - 1], pa.uint64()), str(2**64 - 1)),
        (_UUID, pa.array([_UUID.bytes], pa.uuid()), "6f9619ff-8b86-d011-b42d-00c04fc964ff"),
    ],
)
def test_an_id_from_a_program_is_the_one_of_the_column(value: object, column: pa.Array, expected: str) -> None:
    text = id_text(value, where="subjects")
    assert type(text) is str
    assert text == expected
    assert canonical_ids(column, column="id").to_pylist() == [canonical_id(text)]


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (1.0, "a value of type float"),
        (float("nan"), "a value of type float"),
        (np.float64(1.0), "a value of type float64"),
        (True, "a value of type bool"),
        (np.True_, "a value of type bool"),
        (b"p1", "a value of type bytes"),
        (None, "None"),
        (["p1"], "a value of type list"),
        (decimal.Decimal(1), "a value of type Decimal"),
        (np.array(["p1"]), "a value of type ndarray"),
    ],
)
def test_what_has_no_one_text_is_no_id(value: object, kind: str) -> None:
    with pytest.raises(UserError) as caught:
        id_text(value, where="subjects")
    assert caught.value.message == f"subjects: expected ids that are texts, integers or UUIDs, got {kind}"
    assert "as the table has it" in caught.value.hint


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (KEY, KEY),
        (KEY.hex().encode() + b"\n", KEY),
        (KEY.hex().upper().encode(), KEY),
        (b"x" * 16, hashlib.sha256(b"sisa-key" + b"x" * 16).digest()),
        (bytes(16).hex().encode(), hashlib.sha256(b"sisa-key" + bytes(16)).digest()),
    ],
)
def test_keys_are_read_in_each_form(content: bytes, expected: bytes) -> None:
    assert parse_key(content) == expected


@pytest.mark.parametrize("content", [b"", b"short", b"ab" * 7, b"a" * 33])
def test_weak_keys_are_refused(content: bytes) -> None:
    with pytest.raises(UserError, match="key_file") as caught:
        parse_key(content)
    assert "openssl" in caught.value.hint


def test_keys_hide_their_bytes() -> None:
    secret = new_key()
    shown: list[Any] = [StoreKeys(routing=secret, exclusion=secret), shard_keys(secret, 1)]
    for keys in shown:
        assert repr(secret) not in repr(keys)
        assert secret.hex() not in repr(keys)
    assert len(secret) == 32
    assert secret != new_key()


def test_contexts_do_not_run_into_each_other() -> None:
    assert derive(KEY, "ab", "c") != derive(KEY, "a", "bc")
    assert shard_keys(KEY, 1).order != shard_keys(KEY, 11).order
    assert exclusion_digest(KEY, "subject", "1") != exclusion_digest(KEY, "record", "1")


def test_digests_of_many_ids_derive_one_key(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = ["u1", "\u00e9", "x" * 200]
    expected = [exclusion_digest(KEY, "subject", id_) for id_ in ids]
    derived: list[tuple[str | int, ...]] = []

    def counted(key: bytes, *context: str | int) -> bytes:
        derived.append(context)
        return derive(key, *context)

    monkeypatch.setattr(routing_keys, "derive", counted)
    assert exclusion_digests(KEY, "subject", iter(ids)) == expected
    assert derived == [("exclusion", "subject")]
    assert exclusion_digests(KEY, "record", []) == []
