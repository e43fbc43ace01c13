"""Checking the stages of one shard: their names against the rows, their bytes against digests, what is told of them.

A name is recomputed from the rows on disk, from the first slice on. What the ledger and a stage's own manifest
say beside it (the stage before, records seen, epochs, platform) is held against the same recomputation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from sisa.checkpoints import Manifest, StageId
from sisa.layout import is_held_out
from sisa.ledger import StageRow
from sisa.lineage import stage_key
from sisa.opening import OpenStore
from sisa.planning.epochs import epoch_budget
from sisa.proof.problems import guarded, stage_name
from sisa.proof.rows import SliceRows
from sisa.state import StageState
from sisa.training.order import batch_count
from sisa.training.platform import platform_id


@dataclass(frozen=True)
class ExpectedStage:
    """What the rows on disk call for."""

    key: str
    parent_key: str
    records: int
    """Records of slices 1..r."""


Expected = Mapping[tuple[int, int], ExpectedStage]
"""By shard and stage; a stage whose rows are unreadable, or that comes after them, is missing."""


def expected_chain(store: OpenStore, shard: int, rows: Mapping[int, SliceRows | None]) -> Expected:
    """Recompute a chain from what the slices of its shard hold on disk."""
    footing = store.ledger.footing()
    chain: dict[tuple[int, int], ExpectedStage] = {}
    parent, records = "", 0
    for stage in sorted(number for number in rows if not is_held_out(number)):
        slice_ = rows[stage]
        if slice_ is None or footing is None:
            break
        key = stage_key(
            recipe_digest=store.recipe_digest,
            code_version=footing[0],
            shard=shard,
            stage=stage,
            parent_key=parent,
            membership=slice_.membership,
        )
        records += slice_.records
        chain[shard, stage] = ExpectedStage(key, parent, records)
        parent = key
    return chain


def first_waiting_stage(store: OpenStore, shard: int) -> int:
    """Return the first stage that an open request took from a shard; R+1 if none did."""
    waiting = [
        slice_
        for request in store.ledger.requests.open()
        for k, slice_ in request.places
        if k == shard and not is_held_out(slice_)
    ]
    return min([*waiting, store.slices + 1])  # places come from the ledger, and may lie anywhere


def check_stages(store: OpenStore, shard: int, expected: Expected) -> tuple[list[str], int]:
    """Return what is wrong with a shard's stages, and how many were read."""
    problems = _orphans(store, shard)
    present: set[int] = set()
    for row in store.ledger.stages.all(shard):
        where = stage_name(shard, row.stage)
        if row.tainted:
            problems.append(f"{where}: tainted by a deletion and not purged")
            continue
        if store.ledger.footing() != (row.code, row.platform):
            problems.append(f"{where}: left by an unfinished upgrade; `sisa train CONFIG --upgrade` goes on")
            continue
        if not 1 <= row.stage <= store.slices:
            continue  # said where the ledger is checked by itself
        present.add(row.stage)
        problems += [f"{where}: {fault}" for fault in _row_faults(row, expected)]
        problems += guarded(partial(_check_bytes, store, row), where)
    absent = sorted(set(range(1, first_waiting_stage(store, shard))) - present)
    if absent:
        problems.append(f"shard {shard}: stages {absent} are not trained; `sisa repair` or `sisa train` does it")
    return problems, len(present)


def _orphans(store: OpenStore, shard: int) -> list[str]:
    entered = {(row.key, row.platform) for row in store.ledger.stages.all(shard)}
    return [
        f"{stage_name(shard, identity.stage)}: a checkpoint that the ledger doesn't know (orphan)"
        for identity in store.checkpoints.list_shard(shard)
        if (identity.key, identity.platform) not in entered
    ]


def _row_faults(row: StageRow, expected: Expected) -> list[str]:
    called_for = expected.get((row.shard, row.stage))
    if called_for is None:
        return []
    if row.key != called_for.key:
        return ["its key is not the one that the rows on disk call for"]
    faults = []
    if row.parent_key != called_for.parent_key:
        faults.append("the ledger names another stage than the one before it as its parent")
    if row.records != called_for.records:
        faults.append(f"the ledger says that it saw {row.records} records, its slices hold {called_for.records}")
    return faults


def _check_bytes(store: OpenStore, row: StageRow) -> list[str]:
    """Read all of a stage, and hold what its manifest says against what it must say."""
    identity = StageId(row.shard, row.stage, row.key, row.platform)
    manifest, state = store.checkpoints.load(identity, expect_full_digest=row.full_digest)
    where = stage_name(row.shard, row.stage)
    faults = [f"{where}: state digest differs from the ledger's"] if manifest.state_digest != row.state_digest else []
    wrong = _wrong_fields(store, row, manifest, state)
    if wrong:
        faults.append(f"{where}: its manifest was changed: {', '.join(wrong)}")
    return faults


def _wrong_fields(store: OpenStore, row: StageRow, manifest: Manifest, state: StageState) -> list[str]:
    """Name the fields of a manifest that are not what the training wrote; reading it has checked its digests."""
    training = store.recipe.training
    budget = epoch_budget(epochs=training.epochs, slices=store.recipe.sisa.slices, generations=store.generations)
    epochs = budget[row.stage - 1]
    expected: dict[str, object] = {
        "parent_key": row.parent_key,
        "records": row.records,
        "bytes": sum(tensor.nbytes for tensor in state.tensors.values()),
        "epochs": epochs,
        "steps": epochs * batch_count(records=row.records, batch_size=training.batch_size),
    }
    wrong = [name for name, value in expected.items() if getattr(manifest, name) != value]
    return wrong if platform_id(manifest.fingerprint) == row.platform else [*wrong, "fingerprint"]
