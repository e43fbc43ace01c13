"""The store's memory of what happened: requests, exclusions, partitions, stages, versions, events."""

from sisa.ledger.generations import Generation
from sisa.ledger.ledger import Ledger
from sisa.ledger.partitions import Partition
from sisa.ledger.replicas import ReplicaRow, View
from sisa.ledger.requests import STATES, Acceptance, Kind, Request, Target
from sisa.ledger.stages import StageRow
from sisa.ledger.tokens import SCOPES, Scope, Token
from sisa.ledger.versions import Member, Version

__all__ = [
    "SCOPES",
    "STATES",
    "Acceptance",
    "Generation",
    "Kind",
    "Ledger",
    "Member",
    "Partition",
    "ReplicaRow",
    "Request",
    "Scope",
    "StageRow",
    "Target",
    "Token",
    "Version",
    "View",
]
