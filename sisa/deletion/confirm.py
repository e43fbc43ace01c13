"""Waiting until no replica answers from before a quarantine: it has said so, or its lease has run out."""

from __future__ import annotations

import time

from sisa.clock import elapsed_s
from sisa.ledger import WAITED
from sisa.opening import OpenStore

POLL_S = 0.002


def await_replicas(store: OpenStore, version: int) -> None:
    """Return when nobody answers any more from a version older than the quarantine ``version``.

    That takes one lease at most, even if replicas are dead, frozen or cut off; those are struck off then.
    """
    replicas = store.ledger.replicas
    published = elapsed_s()
    while behind := replicas.behind(version):
        waited_s = elapsed_s() - published
        overdue = [replica.id for replica in behind if waited_s > replica.lease_s * WAITED]
        if overdue:
            replicas.strike_off(overdue, version=version)
        else:
            time.sleep(POLL_S)
