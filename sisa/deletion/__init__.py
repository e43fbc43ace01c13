"""The deletion handler: accept, erase, purge, repair. Every step is journaled before it is taken."""

from sisa.deletion.accept import accept
from sisa.deletion.repair import Repair, bring_up
from sisa.deletion.settle import settle, settle_all

__all__ = ["Repair", "accept", "bring_up", "settle", "settle_all"]
