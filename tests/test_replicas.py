"""Leases in the ledger: who must be waited for, and for how long."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sisa.deletion import confirm
from sisa.ledger import Ledger, Member


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    made = Ledger.create(tmp_path / "ledger.db")
    made.versions.publish([Member(0, 1, "a", "p")], cause="train")
    yield made
    made.close()


def quarantine(ledger: Ledger) -> int:
    return ledger.versions.publish([Member(0, 0, "", "")], cause="quarantine")


def test_a_replica_that_registers_owes_nothing_and_gets_a_lease(ledger: Ledger) -> None:
    view = ledger.replicas.register("r", lease_s=2.0)
    assert (view.version, view.floor, view.renews) == (1, 0, True)
    assert ledger.replicas.view("r").renews
    assert ledger.replicas.behind(0) == []


def test_a_quarantine_gives_no_lease_before_it_is_confirmed(ledger: Ledger) -> None:
    """Else a replica could be struck off, and not be waited for by the next deletion, with a lease running on."""
    ledger.replicas.register("r", lease_s=2.0)
    number = quarantine(ledger)
    view = ledger.replicas.view("r")
    assert (view.floor, view.version, view.renews) == (number, number, False)
    assert [row.id for row in ledger.replicas.behind(number)] == ["r"]
    ledger.replicas.confirm("r", number)
    assert ledger.replicas.behind(number) == []
    assert ledger.replicas.view("r").renews


def test_one_that_was_struck_off_has_to_register_again(ledger: Ledger) -> None:
    ledger.replicas.register("r", lease_s=2.0)
    number = quarantine(ledger)
    ledger.replicas.strike_off(["r"], version=number)
    view = ledger.replicas.view("r")
    assert (view.confirmed, view.renews) == (None, False)
    ledger.replicas.confirm("r", number)  # too late: nobody knows it
    assert not ledger.replicas.view("r").renews
    assert ledger.replicas.register("r", lease_s=2.0).floor == number


def test_one_that_confirmed_in_time_is_not_struck_off(ledger: Ledger) -> None:
    ledger.replicas.register("r", lease_s=2.0)
    number = quarantine(ledger)
    ledger.replicas.confirm("r", number)
    ledger.replicas.strike_off(["r"], version=number)
    assert ledger.replicas.view("r").confirmed == number


def test_a_confirmation_never_goes_back(ledger: Ledger) -> None:
    ledger.replicas.register("r", lease_s=2.0)
    second = max(quarantine(ledger) for _ in range(2))
    ledger.replicas.confirm("r", second)
    ledger.replicas.confirm("r", second - 1)
    assert ledger.replicas.view("r").confirmed == second


class Store:
    """As much of a store as the waiting needs."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger


def test_the_dead_are_waited_for_one_lease_by_our_own_clock(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    naps: list[float] = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        clock[0] += 0.5
        if clock[0] > 101.0:
            ledger.replicas.confirm("late", number)

    monkeypatch.setattr(confirm, "elapsed_s", lambda: clock[0])
    monkeypatch.setattr(confirm.time, "sleep", nap)
    for name, lease_s in (("dead", 2.0), ("late", 60.0)):
        ledger.replicas.register(name, lease_s=lease_s)
    number = quarantine(ledger)
    confirm.await_replicas(Store(ledger), number)  # type: ignore[arg-type]
    assert 2.0 < clock[0] - 100.0 <= 2.5
    assert [row.id for row in ledger.replicas.all()] == ["late"]


def test_with_nobody_there_nothing_is_waited_for(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confirm.time, "sleep", lambda _: pytest.fail("slept"))
    confirm.await_replicas(Store(ledger), quarantine(ledger))  # type: ignore[arg-type]
