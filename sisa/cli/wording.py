"""Answers in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sisa.store.results import Deletion, Repaired


def deletion_lines(done: Deletion) -> list[str]:
    """Say what a deletion did."""
    lines = [f"{done.request}: {done.records} records of {done.subjects} subjects {_state(done.state)}"]
    if done.repeated:
        lines[0] = f"asked before: {lines[0]}"
    if done.missing:
        lines.append(f"{len(done.missing)} ids were not in the store")
    if done.version_quarantine is not None:
        lines.append(f"out of service after {done.seconds_to_quarantine:.3f} s (version {done.version_quarantine})")
    if not done.shards:
        lines.append("only held-out rows: no model had seen them, none was retrained")
    elif done.version_after is not None:
        lines.append(
            f"retrained {done.stages_retrained} stages of shards {_list(done.shards)}; "
            f"live again as version {done.version_after} ({done.seconds:.1f} s in all)"
        )
    else:
        lines.append(f"shards {_list(done.shards)} answer from their last clean stage until `sisa repair`")
    if done.note:
        lines.append(f"not retrained: {done.note}")
    return lines


def repair_lines(done: Repaired) -> list[str]:
    """Say what a repair did."""
    if not done.requests and not done.stages_retrained:
        return [f"nothing to repair (version {done.version_after})"]
    lines = [f"retrained {done.stages_retrained} stages of shards {_list(done.shards)} ({done.seconds:.1f} s)"]
    if done.requests:
        lines.append(f"closed {len(done.requests)} requests: {', '.join(done.requests)}")
    lines.append(f"live: version {done.version_after}")
    return lines


def _state(state: str) -> str:
    return {
        "accepted": "taken out of service; not erased yet",
        "rows_erased": "erased; weights not purged yet",
        "stages_purged": "erased, rows and weights",
        "repairing": "erased, rows and weights; retraining",
        "repaired": "deleted",
    }.get(state, state)


def _list(shards: list[int]) -> str:
    return ", ".join(map(str, shards)) or "none"
