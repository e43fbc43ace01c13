"""Leases in the ledger: who must be waited for, and for how long.

The second half plays the protocol: replicas, acceptors and clients run their real code over a real ledger, one step of
one of them at a time. A step ends at any line (in the check that decides, at any instruction); who goes next, who is
frozen and how time passes is drawn from a seed.
"""

from __future__ import annotations

import random
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import pytest

from sisa.deletion import confirm
from sisa.ledger import HELD, WAITED, Ledger, Member, Place, View
from sisa.serving import replica as replicas
from sisa.serving.replica import NotServingError, Replica


@pytest.fixture
def ledger(place: Place) -> Iterator[Ledger]:
    made = Ledger.create(place)
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
    assert HELD * 2.0 < WAITED * 2.0 < clock[0] - 100.0 <= 2.0  # within the lease
    assert [row.id for row in ledger.replicas.all()] == ["late"]


def test_with_nobody_there_nothing_is_waited_for(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confirm.time, "sleep", lambda _: pytest.fail("slept"))
    confirm.await_replicas(Store(ledger), quarantine(ledger))  # type: ignore[arg-type]


# --- the protocol, played step by step --------------------------------------------------------------

LEASE_S = 2.0
STEPS = 8000
SEEDS = 50
MOST_SEEDS = 400
"""After so many plays a broken rule must have been found: each of those below is in one play of thirty, or more often."""
TRACED = {confirm.__file__, replicas.__file__}


class OverError(BaseException):
    """The play has ended."""


class Actor:
    """A thread that goes on only when it is told to."""

    def __init__(self, play: Play, process: str, work: Callable[[], None], weight: int) -> None:
        self.process = process
        self.weight = weight
        self.turn = threading.Semaphore(0)
        self.alive = True
        self.thread = threading.Thread(target=self._run, args=(play, work), daemon=True)

    def _run(self, play: Play, work: Callable[[], None]) -> None:
        play.own.actor = self
        self.turn.acquire()
        sys.settrace(play.traced)
        try:
            play.pause()
            work()
        except OverError:
            pass
        except BaseException as error:  # noqa: BLE001 - the play's thread raises it
            play.broken = error
        finally:
            sys.settrace(None)
            self.alive = False
            play.back.release()


class Play:
    """Who is there, what time it is, and what has been acknowledged."""

    def __init__(self, seed: int, path: Path) -> None:
        self.random = random.Random(seed)
        self.path = path
        self.back = threading.Semaphore(0)
        self.own = threading.local()
        self.over = False
        self.broken: BaseException | None = None
        self.clock_s = 1000.0
        self.actors: list[Actor] = []
        self.acknowledged = 0
        self.answers = 0
        self.deletions = 0
        self.violations: list[str] = []
        self.servers: list[tuple[Replica, str]] = []
        self.looking_at = ""
        self.step = self.steps = 0
        self.frozen: dict[str | Actor, int] = {}
        """Until which step threads and whole processes stand still."""
        self.stay = self.random.choice([0.5, 0.9, 0.98])
        self.haste = self.random.choice([0.001, 0.004, 0.01])
        self.closely = self.random.random() < 0.3

    def enter(self, process: str, work: Callable[[], None], *, weight: int = 1) -> None:
        self.actors.append(Actor(self, process, work, weight))

    def pause(self) -> None:
        """End the step of the actor that calls; it may be the next one, too."""
        actor = getattr(self.own, "actor", None)
        self._look_around()
        if actor is not None and not self._goes_on(actor):
            self.back.release()
            actor.turn.acquire()
        if self.over:
            raise OverError

    def _look_around(self) -> None:
        """See whether somebody who asked at this moment would get an answer that is too old."""
        for server, process in self.servers:
            bound = server._bound
            if bound is not None and bound.loaded.version < self.acknowledged:
                self.looking_at = process
                if server._may_answer(bound):
                    self.violations.append(f"{process} would answer from before {self.acknowledged}")
        self.looking_at = ""

    def _goes_on(self, actor: Actor) -> bool:
        """Let a step's time pass and draw whether the same actor takes the next one."""
        draw = self.random
        self.step += 1
        if draw.random() < self.haste:
            self.clock_s += draw.choice([0.1, 0.3, 0.5, 0.7]) * LEASE_S
        if draw.random() < 0.002:
            some = draw.choice(self.actors)
            self.frozen[draw.choice([some, some.process])] = self.step + draw.randrange(1000)
        return draw.random() < self.stay and not self._is_frozen(actor) and self.step < self.steps

    def _is_frozen(self, actor: Actor) -> bool:
        return max(self.frozen.get(actor, 0), self.frozen.get(actor.process, 0)) > self.step

    def traced(self, frame: FrameType, event: str, _: Any) -> Any:
        if self.looking_at or frame.f_code.co_filename not in TRACED:
            return None
        if self.closely and frame.f_code.co_name == "_may_answer":
            frame.f_trace_opcodes = True
        if event in {"line", "opcode"}:
            self.pause()
        return self.traced

    def elapsed_s(self) -> float:
        """What the clock of the calling process shows: they have nothing in common but their speed."""
        process = self.looking_at or (self.own.actor.process if hasattr(self.own, "actor") else "")
        return self.clock_s + 10_000.0 * len(process)

    def open_ledger(self) -> Ledger:
        return Ledger.open(self.path)

    def run(self, steps: int) -> None:
        """Play; afterwards every actor has ended."""
        self.steps = steps
        for actor in self.actors:
            actor.thread.start()
        while self.step < steps and self.broken is None:
            able = [one for one in self.actors if one.alive and not self._is_frozen(one)]
            if able:
                self._step(self.random.choices(able, [one.weight for one in able])[0])
            else:
                self.step += 1
        self.over = True
        for one in self.actors:
            while one.alive:
                self._step(one)
            one.thread.join()
        if self.broken is not None:
            raise self.broken

    def _step(self, actor: Actor) -> None:
        actor.turn.release()
        self.back.acquire()


class Flag:
    """An event whose waiting is a step."""

    def __init__(self, play: Play) -> None:
        self._play = play
        self._set = False

    def set(self) -> None:
        self._set = True

    def is_set(self) -> bool:
        return self._set

    def wait(self, _: float) -> bool:
        self._play.pause()
        return self._set


class Turnstile:
    """A condition whose waiting is a step."""

    def __init__(self, play: Play) -> None:
        self._play = play
        self._held = False

    def __enter__(self) -> None:
        while self._held:
            self._play.pause()
        self._held = True

    def __exit__(self, *_: object) -> None:
        self._held = False

    def wait(self, _: float) -> None:
        self._held = False
        self._play.pause()
        self.__enter__()

    def notify_all(self) -> None:
        assert self._held


class Ensemble:
    """Answers with the number of its version."""

    def __init__(self, store: Any) -> None:
        self._store = store

    def load(self) -> Any:
        number = self._store.ledger.versions.live_number()
        answer = SimpleNamespace(version=number)
        return SimpleNamespace(version=number, panel=None, nobody_because=None, answer=lambda _: answer)

    def close(self) -> None:
        self._store.ledger.close()


def stage(play: Play, monkeypatch: pytest.MonkeyPatch, kind: type[Replica]) -> None:
    """One or two servers with three threads each, two who delete, and one who repairs."""

    def opened(layout):
        ledger = play.open_ledger()
        return SimpleNamespace(ledger=ledger, layout=layout, close=ledger.close)

    monkeypatch.setattr(replicas, "open_store", opened)
    monkeypatch.setattr(replicas, "LiveEnsemble", Ensemble)
    monkeypatch.setattr(replicas, "elapsed_s", play.elapsed_s)
    monkeypatch.setattr(confirm, "elapsed_s", play.elapsed_s)
    monkeypatch.setattr(confirm, "time", SimpleNamespace(sleep=lambda _: play.pause()))
    for number in range(play.random.choice([1, 1, 2])):
        server = kind(SimpleNamespace(ledger=play.path), lease_s=LEASE_S)
        server._stopping, server._changed = Flag(play), Turnstile(play)  # type: ignore[assignment]
        process = "server" + "'" * number
        play.servers.append((server, process))
        play.enter(process, server._keep_lease, weight=4)
        play.enter(process, server._keep_loaded, weight=2)
        play.enter(process, lambda server=server: client(play, server), weight=4)
        if play.random.random() < 0.3:
            play.enter(process, lambda server=server: stop(play, server))
    for number in range(2):
        play.enter("deleter" + "'" * number, lambda: deleter(play))
    play.enter("repairer", lambda: repairer(play))


def client(play: Play, server: Replica) -> None:
    """Ask again and again, and hold each answer against what had been acknowledged before the question was sent."""
    while True:
        before = play.acknowledged
        play.pause()
        try:
            answer: Any = server.answer_now(None)  # type: ignore[arg-type]
            if answer is None:
                answer = server.answer(None, patience_s=play.random.choice([0.0, 1.0, 9.0]))  # type: ignore[arg-type]
        except NotServingError:
            continue
        play.answers += 1
        if answer.version < before:
            play.violations.append(f"version {answer.version} after {before} was acknowledged")


def deleter(play: Play) -> None:
    ledger = play.open_ledger()
    while True:
        number = quarantine(ledger)
        confirm.await_replicas(Store(ledger), number)  # type: ignore[arg-type]
        play.acknowledged = max(play.acknowledged, number)
        play.deletions += 1
        for _ in range(play.random.randrange(600)):
            play.pause()


def repairer(play: Play) -> None:
    ledger = play.open_ledger()
    while True:
        for _ in range(play.random.randrange(1, 200)):
            play.pause()
        ledger.versions.publish([Member(0, 1, "a", "p")], cause="repair")


def stop(play: Play, server: Replica) -> None:
    for _ in range(play.random.randrange(STEPS // 8)):
        play.pause()
    server.stop()


def play_all(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, seeds: int, kind: type[Replica] = Replica
) -> Iterator[Play]:
    """Plays of one seed after the other."""
    template = folder / "template.db"
    ledger = Ledger.create(template)
    ledger.versions.publish([Member(0, 1, "a", "p")], cause="train")
    ledger.close()
    for seed in range(seeds):
        path = folder / f"{seed}.db"
        shutil.copy(template, path)
        play = Play(seed, path)
        stage(play, monkeypatch, kind)
        play.run(STEPS)
        path.unlink()
        yield play


@pytest.mark.parametrize("seeds", [SEEDS, pytest.param(40 * SEEDS, marks=pytest.mark.slow)])
def test_no_answer_is_older_than_what_was_acknowledged_before_its_question(
    seeds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = deletions = 0
    for play in play_all(tmp_path, monkeypatch, seeds=seeds):
        assert play.violations == []
        answers += play.answers
        deletions += play.deletions
    assert min(answers, deletions) > seeds


class CountsFromTheReading(Replica):
    """Its lease begins when the reading has ended, however long that took."""

    def _take_in(self, view: View, *, until_s: float | None) -> None:
        super()._take_in(view, until_s=None if until_s is None else replicas.elapsed_s() + self.lease_s)


class IgnoresTheLease(Replica):
    """It answers until it learns of a quarantine."""

    def _may_answer(self, bound: Any) -> bool:
        return bound is not None and bound.loaded.version >= self._lease.floor


class IgnoresTheFloor(Replica):
    """It answers from what is loaded."""

    def _may_answer(self, bound: Any) -> bool:
        return bound is not None and replicas.elapsed_s() < self._lease.until_s


class ConfirmsFirst(Replica):
    """It says that it has stopped, and then stops."""

    def _take_in(self, view: View, *, until_s: float | None) -> None:
        ledger = Ledger.open(self._layout.ledger)
        ledger.replicas.confirm(self.id, view.floor)
        ledger.close()
        super()._take_in(view, until_s=until_s)


class LeavesWithALease(Replica):
    """It strikes itself off and goes on until its lease ends."""

    def _let_go(self) -> None:
        pass

    def _may_answer(self, bound: Any) -> bool:
        lease = self._lease
        return bound is not None and bound.loaded.version >= lease.floor and replicas.elapsed_s() < lease.until_s


@pytest.mark.parametrize(
    "kind", [CountsFromTheReading, IgnoresTheLease, IgnoresTheFloor, ConfirmsFirst, LeavesWithALease]
)
def test_the_play_finds_a_replica_that_breaks_a_rule(
    kind: type[Replica], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert any(play.violations for play in play_all(tmp_path, monkeypatch, seeds=MOST_SEEDS, kind=kind))


def test_the_play_finds_a_lease_in_spite_of_a_quarantine_to_confirm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(View, "renews", property(lambda view: view.confirmed is not None))
    assert any(play.violations for play in play_all(tmp_path, monkeypatch, seeds=MOST_SEEDS))


def test_the_play_finds_an_impatient_acceptor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confirm, "WAITED", 0.4)
    assert any(play.violations for play in play_all(tmp_path, monkeypatch, seeds=MOST_SEEDS))
