"""Whether this process would retrain the bits that a store was trained with."""

from __future__ import annotations

from sisa.errors import FootingError
from sisa.opening import OpenStore
from sisa.training.footing import Footing


def require_same(store: OpenStore, here: Footing) -> None:
    """Make sure that retraining here would give the bits that training there gave.

    Raises:
        FootingError: It wouldn't; nothing may be trained in this store before an upgrade.
    """
    there = store.ledger.footing()
    if there is None or there == (here.code, here.platform):
        return
    old = store.ledger.fingerprint()
    changed = sorted(n for n in old.keys() | here.fingerprint.keys() if old.get(n) != here.fingerprint.get(n))
    reasons = [f"{name} was {old.get(name)!r}, is {here.fingerprint.get(name)!r}" for name in changed]
    if there[0] != here.code:
        reasons.append("the training code or the source of model.factory changed")
    raise FootingError(
        "this process would not retrain bit for bit what the store was trained with: " + "; ".join(reasons),
        hint="Go back to the old footing, or rebuild everything on this one: sisa train CONFIG --upgrade.",
    )
