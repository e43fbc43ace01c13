"""The store's memory of what happened: requests, exclusions, partitions, stages, versions, events."""

from sisa.ledger.generations import Generation
from sisa.ledger.ledger import Ledger
from sisa.ledger.partitions import Partition, PartitionFile
from sisa.ledger.place import Place, PostgresPlace, place_of
from sisa.ledger.replicas import HELD, WAITED, ReplicaRow, View
from sisa.ledger.requests import STATES, Acceptance, Kind, Request, Target, Waiting
from sisa.ledger.schema import REVISION
from sisa.ledger.stages import StageRow
from sisa.ledger.tokens import SCOPES, Scope, Token
from sisa.ledger.versions import Member, Version

__all__ = [
    "HELD",
    "REVISION",
    "SCOPES",
    "STATES",
    "WAITED",
    "Acceptance",
    "Generation",
    "Kind",
    "Ledger",
    "Member",
    "Partition",
    "PartitionFile",
    "Place",
    "PostgresPlace",
    "ReplicaRow",
    "Request",
    "Scope",
    "StageRow",
    "Target",
    "Token",
    "Version",
    "View",
    "Waiting",
    "place_of",
]
