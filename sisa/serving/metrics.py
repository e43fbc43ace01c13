"""What Prometheus may know: times by route template, and where the store stands. No path, no id, no value.

What this process did is counted as it happens. Where the store stands is read when somebody asks, so that a number
is never older than the scrape. Each process has a registry of its own and answers for itself; a scrape of one port
that several processes share meets one of them.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from sisa.errors import SisaError
from sisa.ledger import STATES, Ledger
from sisa.serving.logs import Exchange

CONTENT_TYPE = CONTENT_TYPE_LATEST
CONSTITUENTS = ("live", "quarantined", "absent")
BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Where a store and its replica stand at one moment."""

    version: int
    """The live version; 0 if none was published."""
    constituents: Mapping[str, int]
    """Shards by what answers for them: their newest stage (live); an earlier one, as a deletion of theirs is open
    (quarantined); nothing (absent)."""
    deletions: Mapping[str, int]
    """Requests by state."""
    oldest_open_s: float
    """Age of the oldest deletion that isn't repaired; 0 if there is none."""
    lease_age_s: float | None = None
    """Since the replica's lease was last renewed; None if it holds none."""


def read_facts(ledger: Ledger, *, lease_age_s: float | None = None) -> Facts:
    """Read where the store stands.

    Raises:
        StoreError: The ledger can't be read.
    """
    with ledger.database.snapshot():
        version = ledger.versions.live()
        rows = ledger.database.rows("SELECT state, count(*) AS number FROM requests GROUP BY state")
        waiting = ledger.requests.open()
    touched = {shard for request in waiting for shard in request.shards}
    states = Tally(
        "absent" if member.stage == 0 else "quarantined" if member.shard in touched else "live"
        for member in version.members
    )
    ages_s = [(datetime.now(UTC) - datetime.fromisoformat(request.created_at)).total_seconds() for request in waiting]
    return Facts(
        version=version.number,
        constituents=states,
        deletions={row["state"]: row["number"] for row in rows},
        oldest_open_s=max(0.0, *ages_s) if ages_s else 0.0,
        lease_age_s=lease_age_s,
    )


class Metrics:
    """The metrics of one process."""

    def __init__(self, facts_of: Callable[[], Facts]) -> None:
        """Make a registry.

        Args:
            facts_of: Called by each scrape, in the scrape's thread.
        """
        self.registry = CollectorRegistry()
        self._seconds = Histogram(
            "sisa_http_request_seconds",
            "Time to the end of the answer, by route template.",
            ("method", "route", "status"),
            buckets=BUCKETS_S,
            registry=self.registry,
        )
        self._answers = Counter(
            "sisa_answers", "Batches that were answered, by the path of evaluation.", ("path",), registry=self.registry
        )
        self._rows = Counter(
            "sisa_answered_rows",
            "Rows that were answered, by the path of evaluation.",
            ("path",),
            registry=self.registry,
        )
        self._known: dict[tuple[str, str, int], Histogram] = {}
        self._paths: dict[str, tuple[Counter, Counter]] = {}
        self.registry.register(_Standing(facts_of))

    def observe(self, exchange: Exchange) -> None:
        """Count a request; to be called by the access log."""
        key = (exchange.method, exchange.route, exchange.status)
        child = self._known.get(key)
        if child is None:
            child = self._known[key] = self._seconds.labels(*map(str, key))
        child.observe(exchange.seconds)

    def answered(self, path: str, *, rows: int) -> None:
        """Count an answer: ``path`` is how the ensemble computed it, one of a handful of words."""
        if path not in self._paths:
            self._paths[path] = (self._answers.labels(path), self._rows.labels(path))
        answers, answered_rows = self._paths[path]
        answers.inc()
        answered_rows.inc(rows)

    def text(self) -> bytes:
        """Return the exposition, of type ``CONTENT_TYPE``."""
        return generate_latest(self.registry)


class _Standing(Collector):
    """Reads the ledger when it is asked. A ledger that can't be read is a metric too, and costs no other."""

    def __init__(self, facts_of: Callable[[], Facts]) -> None:
        self._facts_of = facts_of

    def describe(self) -> list[GaugeMetricFamily]:
        """Return nothing, so that registering doesn't read."""
        return []

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Return the gauges."""
        try:
            facts = self._facts_of()
        except SisaError:
            yield _gauge("sisa_ledger_readable", "Whether the ledger could be read.", 0)
            return
        yield _gauge("sisa_ledger_readable", "Whether the ledger could be read.", 1)
        yield _gauge("sisa_version", "Number of the live ensemble version.", facts.version)
        yield _by_state("sisa_constituents", "Constituent models.", CONSTITUENTS, facts.constituents)
        yield _by_state("sisa_deletions", "Deletion requests.", STATES, facts.deletions)
        yield _gauge("sisa_oldest_open_deletion_age_seconds", "0 if no deletion is open.", facts.oldest_open_s)
        if facts.lease_age_s is not None:
            yield _gauge("sisa_lease_age_seconds", "Since the lease was last renewed.", facts.lease_age_s)


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=value)


def _by_state(name: str, text: str, states: tuple[str, ...], counts: Mapping[str, int]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, f"{text} By state.", labels=["state"])
    for state in states:
        family.add_metric([state], counts.get(state, 0))
    return family
