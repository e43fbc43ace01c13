"""What a running Ray is told of a training: counts and times by the number of shards, and no name of anything."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from ray.util import metrics

from sisa.execution.meters import Meters
from sisa.training.events import Kept, Said, StageDone, Trained


class Meter:
    """Notes what is counted."""

    def __init__(self, name, **options):
        self.name, self.tags, self.noted = name, options["tag_keys"], []

    def set_default_tags(self, tags):
        self.tags = tags

    def inc(self, amount=1.0):
        self.noted.append(amount)

    observe = inc


@pytest.fixture
def made(monkeypatch):
    found = []

    def meter(name, description, **options):
        assert description
        found.append(Meter(name, **options))
        return found[-1]

    monkeypatch.setattr(metrics, "Counter", meter)
    monkeypatch.setattr(metrics, "Histogram", meter)
    return found


def test_stages_work_and_seconds_are_counted_and_nothing_else(made):
    meters = Meters(shards=20)
    row = SimpleNamespace(seconds=2.5, shard=3, key="secret")
    meters.count([Trained(3, 40), Trained(4, 0), StageDone(row, reused=False), StageDone(row, reused=True)])
    meters.count([Kept(3, 1), Said("a word"), Trained(3, 2)])
    assert {meter.name: meter.noted for meter in made} == {
        "sisa_stages_trained": [1.0],
        "sisa_record_epochs": [40, 2],
        "sisa_stage_seconds": [2.5],
    }
    assert all(meter.tags == {"shards": "20"} for meter in made)
