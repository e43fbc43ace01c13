"""Answers in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sisa.proof.verify import Verification
    from sisa.store.results import Addition, Correction, Deletion, Metrics, Repaired


def counted(count: int, noun: str) -> str:
    """Say how many there are.

    >>> counted(1, "record"), counted(1200, "stage")
    ('1 record', '1,200 stages')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def deletion_lines(done: Deletion) -> list[str]:
    """Say what a deletion did."""
    if not done.request:
        return [f"nothing to delete: none of {counted(len(done.missing), 'id')} is in the store; nothing was changed"]
    lines = [
        f"{done.request}: {counted(done.records, 'record')} of {counted(done.subjects, 'subject')} {_state(done.state)}"
    ]
    if done.repeated:
        lines[0] = f"asked before: {lines[0]}"
    if done.missing:
        lines.append(f"{counted(len(done.missing), 'id')} not in the store")
    if done.version_quarantine is not None:
        lines.append(f"out of service after {done.seconds_to_quarantine:.3f} s (version {done.version_quarantine})")
    if not done.shards:
        lines.append("only held-out rows: no model had seen them, none was retrained")
    elif done.version_after is not None:
        lines.append(
            f"retrained {counted(done.stages_retrained, 'stage')} of {_shards(done.shards)}; "
            f"live again as version {done.version_after} ({done.seconds:.1f} s in all)"
        )
    else:
        lines.append(
            f"not retrained: {_shards(done.shards)}; no stage that saw these rows answers; next: `sisa repair`"
        )
    if done.note:
        lines.append(f"not retrained: {done.note}")
    return lines


def repair_lines(done: Repaired) -> list[str]:
    """Say what a repair did."""
    if not done.requests and not done.stages_retrained:
        return [f"nothing to repair (version {done.version_after})"]
    lines = [f"retrained {counted(done.stages_retrained, 'stage')} of {_shards(done.shards)} ({done.seconds:.1f} s)"]
    if done.requests:
        lines.append(f"closed {counted(len(done.requests), 'request')}: {', '.join(done.requests)}")
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


def verification_lines(found: Verification, *, replay: bool) -> list[str]:
    """Say what a verification found."""
    replayed = f"{found.stages_replayed:,} retrained from nothing ({found.comparison})"
    lines = [f"{counted(found.stages_checked, 'stage')} checked, {replayed if replay else 'none retrained (--replay)'}"]
    lines += [f"  problem: {problem}" for problem in found.problems]
    return [*lines, "ok" if found.ok else f"FAILED: {counted(len(found.problems), 'problem')}"]


def _shards(shards: list[int]) -> str:
    return f"shard{'' if len(shards) == 1 else 's'} {', '.join(map(str, shards)) or 'none'}"


def metrics_lines(metrics: Metrics | None) -> list[str]:
    """Say how well the live ensemble answers on the holdout, if that was measured."""
    if metrics is None:
        return []
    return [
        (
            f"accuracy {metrics.accuracy:.4f}, log loss {metrics.log_loss:.4f} on "
            f"{counted(metrics.records, 'held-out record')} ({counted(metrics.voters, 'voter')})"
        )
    ]


def addition_lines(done: Addition) -> list[str]:
    """Say what was added, and what it took."""
    verb = "was there already" if done.repeated else "added"
    lines = [
        (
            f"generation {done.generation} {verb}: {counted(done.records, 'record')} in slice {done.slice} of the shards, "
            f"{done.holdout_records:,} held out"
        )
    ]
    if done.excluded_records:
        lines.append(f"left out: {counted(done.excluded_records, 'row')} of deleted people")
    trained = f"trained {counted(done.stages_trained, 'stage')}" if done.stages_trained else "nothing was trained"
    return [*lines, f"{trained} ({done.seconds:.1f} s); live: version {done.version}", *metrics_lines(done.metrics)]


def correction_lines(done: Correction) -> list[str]:
    """Say what a correction did."""
    same = (
        f"{counted(done.unchanged, 'row')} of the table {'says' if done.unchanged == 1 else 'say'} what the store has"
    )
    if not done.request:
        return [f"nothing to correct: {same}; nothing was changed"]
    state = "corrected" if done.state == "repaired" else "replaced; not retrained yet"
    lines = [f"{done.request}: {counted(done.records, 'record')} of {counted(done.subjects, 'subject')} {state}"]
    if done.unchanged and not done.repeated:
        lines.append(same)
    if done.version_quarantine is not None:
        lines.append(f"out of service after {done.seconds_to_quarantine:.3f} s (version {done.version_quarantine})")
    if not done.shards:
        lines.append("only held-out rows: no model had seen them, none was retrained")
    elif done.version_after is not None:
        lines.append(
            f"retrained {counted(done.stages_retrained, 'stage')} of {_shards(done.shards)}; "
            f"live again as version {done.version_after} ({done.seconds:.1f} s in all)"
        )
    if done.note:
        lines.append(f"not retrained: {done.note}")
    return lines
