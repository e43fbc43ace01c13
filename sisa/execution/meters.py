"""What Ray's dashboard and Prometheus may know of a training, while it runs on Ray: counts and times, nobody's names."""

from __future__ import annotations

from collections.abc import Sequence

from sisa.training.events import Event, StageDone, Trained

BOUNDARIES_S = [0.1, 1.0, 10.0, 60.0, 600.0, 3_600.0, 36_000.0]


class Meters:
    """Three metrics, told apart by the number of shards alone: neither stores nor stages nor keys have names here."""

    def __init__(self, *, shards: int) -> None:
        from ray.util import metrics

        tags = ("shards",)
        self._stages = metrics.Counter("sisa_stages_trained", description="Stages trained.", tag_keys=tags)
        self._work = metrics.Counter(
            "sisa_record_epochs", description="Records that went through a model.", tag_keys=tags
        )
        self._seconds = metrics.Histogram(
            "sisa_stage_seconds", description="Training of one stage.", boundaries=BOUNDARIES_S, tag_keys=tags
        )
        for meter in (self._stages, self._work, self._seconds):
            meter.set_default_tags({"shards": str(shards)})

    def count(self, events: Sequence[Event]) -> None:
        """Count what chains report."""
        for event in events:
            if isinstance(event, Trained) and event.record_epochs > 0:
                self._work.inc(event.record_epochs)
            elif isinstance(event, StageDone) and not event.reused:
                self._stages.inc()
                self._seconds.observe(event.row.seconds)
