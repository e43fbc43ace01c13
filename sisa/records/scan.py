"""The first pass over a source: everything that can be refused is refused here, and nothing is written.

Checked are ids (present, not empty, each record's once across all sources), labels (declared), values (of
their kind, finite) and text that nobody declared to be categories.

Memory doesn't grow with the records: hashes of their ids, under a key that lives as long as the scan, wait on disk in
buckets, and each bucket is looked through by itself. Where hashes meet, the ids decide.
"""

from __future__ import annotations

import contextlib
import secrets
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sisa.errors import SourceError
from sisa.layout import HOLDOUT_SLICE
from sisa.records.arrivals import Intake, Progress, arrivals, arriving_ids
from sisa.records.names import RECORD, SUBJECT
from sisa.records.spill import Spill, as_hashes, as_rows
from sisa.routing.siphash import siphash_text

SHOWN = 5
"""How many ids a message names."""
FREE_TEXT_WORDS = 6.0
FREE_TEXT_CHARACTERS = 100.0
MOST_CATEGORIES = 10_000
SAMPLED = 256
"""Values of a batch that stand for it when words are counted."""
MOST_SUSPECTS = 200_000
"""Hashes that meet of which the ids are looked up in one pass: if all the world repeats, some of it is enough to say so."""


@dataclass(frozen=True)
class ScanReport:
    """What a source holds for a recipe."""

    records: int
    """Records that may enter, the holdout's included."""
    holdout_records: int
    subjects: int
    """Their owners."""
    excluded_records: int
    """Rows of deleted people, which are left out."""


def scan(
    intake: Intake,
    *,
    undeclared_text: Sequence[str] = (),
    scratch: Path | None = None,
    on_progress: Progress | None = None,
) -> ScanReport:
    """Read the sources once and check every record.

    Args:
        intake: What to read.
        undeclared_text: Features that are categories only because they are text; these may turn out to be
            free text, which can't be trained on yet.
        scratch: An existing folder on whose file system hashes of ids may wait, in a file without a name.
        on_progress: Told how many more records were read.

    Raises:
        SourceError: A record can't be used; nothing was written.
        StoreError: There is no room for hashes.
    """
    key = secrets.token_bytes(16)
    holdout_records = excluded = 0
    watches = [_TextWatch(name) for name in undeclared_text]
    own_subjects = intake.recipe.data.subject_column == intake.recipe.data.record_id
    with (
        contextlib.closing(Spill(width=8, folder=scratch)) as records,
        contextlib.closing(Spill(width=8, folder=scratch)) as subjects,
    ):
        for arrived in arrivals(intake):
            records.add(as_rows(siphash_text(key, arrived.batch.column(RECORD))))
            if not own_subjects:
                subjects.add(as_rows(siphash_text(key, arrived.batch.column(SUBJECT))))
            holdout_records += int((arrived.slice_N == HOLDOUT_SLICE).sum())
            excluded += arrived.excluded
            for watch in watches:
                watch.see(arrived.batch.column(watch.name))
            if on_progress is not None:
                on_progress(arrived.read)
        for watch in watches:
            watch.judge()
        _check_unique(records, key, intake)
        count = records.count
        owners = count if own_subjects else sum(len(np.unique(as_hashes(bucket))) for bucket in subjects.buckets())
    return ScanReport(records=count, holdout_records=holdout_records, subjects=owners, excluded_records=excluded)


def _check_unique(records: Spill, key: bytes, intake: Intake) -> None:
    """Find ids that occur twice: by hash first, and where hashes meet by the ids themselves."""
    for suspects in _suspects(records):  # more than one group only if those before had met by chance
        counts: Counter[str] = Counter()
        for ids in arriving_ids(intake):
            suspicious = np.isin(siphash_text(key, ids), suspects)
            if suspicious.any():
                counts.update(ids.filter(pa.array(suspicious)).to_pylist())
        twice = sorted(name for name, count in counts.items() if count > 1)
        if twice:
            raise _repeated(twice, intake, all_=len(suspects) < MOST_SUSPECTS)


def _suspects(records: Spill) -> Iterator[NDArray[np.uint64]]:
    """Yield the hashes that occur more than once, at most so many at a time."""
    found = np.empty(0, np.uint64)
    for bucket in records.buckets():
        hashes = np.sort(as_hashes(bucket))
        found = np.concatenate([found, np.unique(hashes[1:][hashes[1:] == hashes[:-1]])])
        while len(found) >= MOST_SUSPECTS:
            yield found[:MOST_SUSPECTS]
            found = found[MOST_SUSPECTS:]
    if len(found):
        yield found


def _repeated(twice: list[str], intake: Intake, *, all_: bool) -> SourceError:
    shown = ", ".join(map(repr, twice[:SHOWN])) + (", ..." if len(twice) > SHOWN else "")
    amount = str(len(twice)) if all_ else f"at least {len(twice)}"
    problem = f"{intake.recipe.data.record_id!r} must not repeat, but {amount} record ids occur more than once"
    return SourceError(
        f"{problem}: {shown}",
        hint="Give each row its own id; name the person in data.subject_id.",
        without_ids=problem,
    )


class _TextWatch:
    """Looks whether a text column holds categories or prose."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._distinct: set[str] = set()
        self._sampled = self._words = self._characters = 0

    def see(self, texts: pa.StringArray) -> None:
        """Take in a batch."""
        present = texts.drop_null()
        sample = present.slice(0, SAMPLED)
        self._sampled += len(sample)
        self._words += sum(len(text.split()) for text in sample.to_pylist())
        self._characters += pc.sum(pc.utf8_length(sample)).as_py() or 0
        if len(self._distinct) <= MOST_CATEGORIES:
            self._distinct.update(pc.unique(present).to_pylist())

    def judge(self) -> None:
        """Refuse prose.

        Raises:
            SourceError: The column looks like free text.
        """
        sampled = max(self._sampled, 1)
        if self._words / sampled >= FREE_TEXT_WORDS:
            reason = f"its values have {self._words / sampled:.0f} words on average"
        elif self._characters / sampled > FREE_TEXT_CHARACTERS:
            reason = f"its values have {self._characters / sampled:.0f} characters on average"
        elif len(self._distinct) > MOST_CATEGORIES:
            reason = f"it has more than {MOST_CATEGORIES:,} distinct values"
        else:
            return
        raise SourceError(
            f"feature {self.name!r} looks like free text ({reason}), which is not supported yet",
            hint=f"If these are categories, declare columns.{self.name}.type: categorical; else leave the feature out.",
        )
