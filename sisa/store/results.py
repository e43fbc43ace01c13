"""What the verbs answer. Field names are the JSON's."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class _Answer:
    def as_dict(self) -> dict[str, object]:
        """Return plain data, as ``--json`` prints it."""
        return asdict(self)


@dataclass(frozen=True)
class Metrics(_Answer):
    """Measured on the holdout."""

    accuracy: float
    """Share of rows whose class was predicted."""
    log_loss: float
    """Mean negative log-probability of the true class, in nats."""
    records: int
    voters: int
    """Constituents that answered."""


@dataclass(frozen=True)
class Training(_Answer):
    """What ``train`` did."""

    store: str
    version: int
    records: int
    """Rows that may be trained on; the holdout is not among them."""
    subjects: int
    holdout_records: int
    shards: int
    slices: int
    stages_trained: int
    stages_reused: int
    seconds: float
    metrics: Metrics | None
    missing_from_source: int = 0
    """Rows that the store has and the source hasn't any more: kept, since only ``delete`` deletes."""


@dataclass(frozen=True)
class Addition(_Answer):
    """What ``add`` did."""

    generation: int
    """1 for the first one that was added."""
    slice: int
    """Which slice of each shard it is: R+g."""
    records: int
    """Its rows that are trained on, as they are in the store now; the held-out ones are not among them."""
    holdout_records: int
    excluded_records: int
    """Rows of deleted people in the table, which were left out."""
    repeated: bool
    """It was in the store already; what was missing was trained."""
    stages_trained: int
    version_before: int
    version: int
    metrics: Metrics | None
    seconds: float


@dataclass(frozen=True)
class Correction(_Answer):
    """What ``correct`` did. ``request`` is empty if every row says already what the table says."""

    request: str
    state: str
    records: int
    """Rows that were changed."""
    subjects: int
    unchanged: int
    """Rows of the table that say what the store has."""
    shards: list[int]
    stages_retrained: int
    version_before: int
    version_quarantine: int | None
    version_after: int | None
    seconds_to_quarantine: float
    seconds: float
    repeated: bool = False
    """Nothing differed any more, but an earlier correction was not finished: it was gone on with."""
    note: str = ""
    """Why the repair has to wait, if it has to."""


@dataclass(frozen=True)
class Deletion(_Answer):
    """What ``delete`` did. Numbers are those of ``request``, which is empty if no id was known."""

    request: str
    state: str
    """Of ``requests``, the one that is furthest behind."""
    subjects: int
    records: int
    missing: list[str]
    shards: list[int]
    stages_retrained: int
    version_before: int
    version_quarantine: int | None
    version_after: int | None
    """Of ``requests``, the newest; None while one is due."""
    seconds_to_quarantine: float
    seconds: float
    repeated: bool = False
    """The same deletion was asked for before; ``request`` names the first."""
    requests: list[str] = field(default_factory=list)
    """Every request that the ids belong to: ``request``, and those by which some were deleted before."""
    note: str = ""
    """Why the repair has to wait, if it has to."""


@dataclass(frozen=True)
class Repaired(_Answer):
    """What ``repair`` did, over all requests that it closed."""

    requests: list[str]
    request: str
    state: str
    subjects: int
    records: int
    missing: list[str] = field(default_factory=list)
    shards: list[int] = field(default_factory=list)
    stages_retrained: int = 0
    version_before: int = 0
    version_quarantine: int | None = None
    version_after: int | None = None
    seconds_to_quarantine: float = 0.0
    seconds: float = 0.0
