"""Rows that are put in order on disk: the same rows come back, memory doesn't grow, and nobody finds them."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from records_tools import KEY, people, resolved, saved, stored

from sisa.errors import SourceError, StoreError
from sisa.lineage import canonical_order, membership, membership_in_order
from sisa.records import ingest, scan, spill
from sisa.records.spill import Spill, as_hashes, as_rows


@pytest.mark.parametrize("budget_bytes", [64, 100, 5_000, 10**6])
@pytest.mark.parametrize("count", [0, 1, 2_000])
def test_all_rows_come_back_in_buckets_that_ascend(count: int, budget_bytes: int, tmp_path: Path) -> None:
    rows_N4 = np.random.default_rng(count).integers(0, 256, (count, 4)).astype(np.uint8)
    with contextlib.closing(Spill(width=4, folder=tmp_path, budget_bytes=budget_bytes)) as spilled:
        for start in range(0, count, 300):
            spilled.add(rows_N4[start : start + 300])
        assert spilled.count == count
        found = list(spilled.buckets())
        assert not list(tmp_path.iterdir())
    got = [bytes(row) for bucket in found for row in bucket]
    assert sorted(got) == sorted(bytes(row) for row in rows_N4)
    if len(found) > 1:  # within a bucket anything goes
        firsts = [int.from_bytes(row[:2]) >> 6 for row in got]
        assert firsts == sorted(firsts)


def test_hashes_are_rows_that_sort_as_they_do() -> None:
    hashes_N = np.random.default_rng(0).integers(0, 2**64, 100, dtype=np.uint64)
    rows = as_rows(hashes_N)
    assert (as_hashes(rows) == hashes_N).all()
    assert sorted(range(100), key=lambda i: bytes(rows[i])) == np.argsort(hashes_N).tolist()


def test_a_membership_in_order_is_the_membership() -> None:
    pairs_N32 = np.random.default_rng(0).integers(0, 256, (1000, 32)).astype(np.uint8)
    whole = membership(pairs_N32[:, :16], pairs_N32[:, 16:])
    ordered = pairs_N32[canonical_order(pairs_N32[:, :16])]
    assert membership_in_order(1000, [ordered[:1], ordered[1:1], ordered[1:700], ordered[700:]]) == whole
    for count, parts in [(1000, [ordered[500:], ordered[:500]]), (999, [ordered]), (1001, [ordered])]:
        with pytest.raises(ValueError, match="came"):
            membership_in_order(count, parts)


def test_small_budgets_find_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Duplicates far apart, counts of people and memberships don't depend on what had to wait on disk."""
    recipe = resolved(saved(tmp_path, people()))
    whole = ingest.scan(recipe, routing_key=KEY), stored(tmp_path / "whole", recipe)[1]
    monkeypatch.setattr(spill.Spill.__init__, "__kwdefaults__", {"folder": None, "budget_bytes": 64})
    assert (ingest.scan(recipe, routing_key=KEY), stored(tmp_path / "pieces", recipe)[1]) == whole
    repeated = people().to_pydict()
    for first, second in [(3, 190), (100, 101)]:
        repeated["rid"][second] = repeated["rid"][first]
    twice = resolved(saved(tmp_path, people().set_column(0, "rid", [repeated["rid"]]), "twice.parquet"))
    with pytest.raises(SourceError, match=r"but 2 record ids occur more than once: '300', '9'$"):
        ingest.scan(twice, routing_key=KEY)
    monkeypatch.setattr(scan, "MOST_SUSPECTS", 1)
    with pytest.raises(SourceError, match="at least 1 record ids"):
        ingest.scan(twice, routing_key=KEY)
    monkeypatch.setattr(scan, "siphash_text", lambda _, ids: np.arange(len(ids), dtype=np.uint64) // 2)
    assert ingest.scan(recipe, routing_key=KEY).records == 200  # every hash is met, by another id


def test_a_full_disk_is_said() -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full")
    with contextlib.closing(Spill(width=8, budget_bytes=64)) as spilled:
        spilled._file = full.open("wb", buffering=0)
        with pytest.raises(StoreError, match="No space left"):
            spilled.add(np.zeros((1000, 8), np.uint8))


def test_memory_does_not_grow_with_the_rows() -> None:
    """Six million hashes (48 MB) within a budget of 1 MB: a list of them fails."""
    code = (
        "import resource, numpy as np; from sisa.records.spill import Spill, as_hashes\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "s = Spill(width=8, budget_bytes=2**20); rng = np.random.default_rng(0)\n"
        "make = lambda: rng.integers(0, 256, (20_000, 8)).astype(np.uint8)\n"
        "s.add(make()); before = peak()\n"
        "for _ in range(300): s.add(make())\n"
        "print(sum(len(np.unique(as_hashes(b))) for b in s.buckets()), peak() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    distinct, grown_kib = map(int, done.stdout.split())
    assert distinct == 301 * 20_000
    assert grown_kib < 16 * 1024 <= 48 * 10**6 // 1024
