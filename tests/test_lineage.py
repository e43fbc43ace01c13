"""Lineage keys and membership digests: golden values, and what must and mustn't move them."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest

from sisa import lineage

BASE: dict[str, Any] = {
    "recipe_digest": "a" * 64,
    "code_version": "1",
    "shard": 2,
    "stage": 3,
    "parent_key": "b" * 64,
    "membership": "c" * 64,
}


def digests(count: int, seed: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, (count, 16), dtype=np.uint8)


def test_golden_stage_key() -> None:
    assert lineage.stage_key(**BASE) == "dc176ca21fc71f41e23392a1f3c31c5d8d1f45741b563f0c6d2f3b4ac701bdf0"


def test_golden_membership() -> None:
    ids = np.arange(48, dtype=np.uint8).reshape(3, 16)
    assert (
        lineage.membership(ids, ids[::-1].copy()) == "122725fa88af6ea5632fb787c6421f25c660220b395da030bf93275b3e1f4b7a"
    )


def test_golden_semantics() -> None:
    assert lineage.SEMANTICS == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("recipe_digest", "d" * 64),
        ("code_version", "2"),
        ("shard", 3),
        ("stage", 2),
        ("parent_key", ""),
        ("membership", "e" * 64),
    ],
)
def test_a_key_that_omits_a_part_would_reuse_stale_weights(field: str, value: object) -> None:
    assert lineage.stage_key(**{**BASE, field: value}) != lineage.stage_key(**BASE)


def test_neighbouring_fields_do_not_run_into_each_other() -> None:
    one = lineage.stage_key(**{**BASE, "recipe_digest": "ab", "code_version": "c"})
    two = lineage.stage_key(**{**BASE, "recipe_digest": "a", "code_version": "bc"})
    assert one != two


def test_membership_ignores_order_of_rows() -> None:
    ids, contents = digests(500, 1), digests(500, 2)
    shuffled = np.random.default_rng(3).permutation(500)
    assert lineage.membership(ids, contents) == lineage.membership(ids[shuffled], contents[shuffled])


def test_membership_equals_its_definition() -> None:
    ids, contents = digests(300, 4), digests(300, 5)
    ids[:40, :15] = ids[0, :15]
    ids[:40, 15] = np.random.default_rng(9).permutation(256)[:40]
    rows = sorted(zip((row.tobytes() for row in ids), (row.tobytes() for row in contents), strict=True))
    expected = hashlib.sha256((300).to_bytes(8, "little") + b"".join(a + b for a, b in rows)).hexdigest()
    assert lineage.membership(ids, contents) == expected


@pytest.mark.parametrize("position", [0, 1, 250, 498, 499])
def test_tail_records_change_the_membership(position: int) -> None:
    ids, contents = digests(500, 1), digests(500, 2)
    whole = lineage.membership(ids, contents)
    assert lineage.membership(np.delete(ids, position, 0), np.delete(contents, position, 0)) != whole
    changed = contents.copy()
    changed[position, 15] ^= 1
    assert lineage.membership(ids, changed) != whole


def test_an_empty_slice_has_a_membership() -> None:
    nobody = np.empty((0, 16), np.uint8)
    assert lineage.membership(nobody, nobody) == hashlib.sha256(bytes(8)).hexdigest()


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="expected"):
        lineage.canonical_order(np.zeros((3, 15), np.uint8))
    with pytest.raises(ValueError, match="expected"):
        lineage.membership(digests(2, 1), np.zeros((2, 16), np.int64))
    with pytest.raises(ValueError, match="content digests"):
        lineage.membership(digests(2, 1), digests(3, 1))
