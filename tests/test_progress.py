"""How far a training is: nothing counts twice, a log gets whole lines, and a terminal one live line of any size."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sisa.cli import reporting
from sisa.cli.pace import WINDOW_S, Pace
from sisa.planning.tally import Tally


class Clock:
    """A clock that a test sets."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


# --- what is done -----------------------------------------------------------------------------------


def test_work_that_is_lost_and_made_again_counts_once():
    tally = Tally({0: {1: 10, 2: 20}, 1: {2: 20}})
    assert (tally.total, tally.stages) == (50, 3)
    done = tally.trained(0, 6) + tally.finished(0, 1)
    assert (done, tally.stages_done) == (10, 1)
    done += tally.trained(0, 15)
    done += tally.restarted(0)  # its worker died in the second stage
    assert done == 10
    done += tally.finished(0, 1)  # another worker found the first
    assert (done, tally.stages_done) == (10, 1)
    done += tally.resumed(0, 12) + tally.trained(0, 8) + tally.finished(0, 2)
    assert done == 30
    done += tally.finished(1, 1)  # was there before
    done += tally.finished(1, 2)  # was found, though the ledger didn't know
    assert (done, tally.stages_done) == (50, 3)


@given(st.lists(st.tuples(st.sampled_from(["trained", "resumed", "restarted", "finished"]), st.integers(0, 40)), max_size=30))  # fmt: skip
def test_whatever_is_reported_what_is_done_stays_between_nothing_and_everything(said):
    tally = Tally({0: {1: 10, 2: 20, 3: 30}})
    done = 0
    for what, number in said:
        if what == "finished":
            done += tally.finished(0, number % 3 + 1 if number % 3 <= tally.stages_done else tally.stages_done + 1)
        else:
            done += getattr(tally, what)(0, *([] if what == "restarted" else [number]))
        assert 0 <= done <= tally.total
    for stage in (1, 2, 3):
        done += tally.finished(0, stage)
    assert (done, tally.stages_done) == (tally.total, 3)


# --- how it is told ---------------------------------------------------------------------------------


def test_the_parts_are_share_stages_cost_rate_and_time_left():
    clock = Clock()
    pace = Pace("training", 1_000_000, clock=clock)
    pace.stages = (0, 10_000)
    clock.now += 10
    pace.advance(20_000)
    pace.stages = (200, 10_000)
    assert pace.parts() == ["2 %", "200/10,000 stages", "20.0k record-epochs", "2.00k records/s", "8:10 left"]


def test_work_that_was_found_says_nothing_of_the_rate_and_costs_nothing():
    clock = Clock()
    pace = Pace("training", 1_000, clock=clock)
    pace.stages = (1, 2)
    pace.found(500)
    clock.now += 10
    pace.advance(100)
    assert pace.parts() == ["60 %", "1/2 stages", "100 record-epochs", "10 records/s", "0:40 left"]
    pace.found(-400)  # a worker died
    assert pace.parts()[0] == "20 %"


def test_the_rate_is_that_of_the_last_while():
    clock = Clock()
    pace = Pace("training", 10**6, clock=clock)
    for _ in range(100):
        clock.now += 1
        pace.advance(1_000)
    for _ in range(int(WINDOW_S) + 2):  # half of the machines leave
        clock.now += 1
        pace.advance(500)
    assert pace.rate == pytest.approx(500, rel=0.02)


def test_a_log_gets_whole_lines_now_and_then(capsys, monkeypatch):
    clock = Clock()
    monkeypatch.setattr("time.monotonic", clock)
    lines = reporting.Lines()
    lines.begin("training", 1_000)
    lines.stages(0, 4)
    for second in range(60):
        clock.now += 1
        lines.advance(15)
        lines.stages(second // 15, 4)
    lines.note("a note")
    lines.end()
    out, err = capsys.readouterr()
    assert (out, "\r" in err, "\x1b" in err) == ("", False, False)
    said = err.splitlines()
    assert said[0] == "training: 3 %, 0/4 stages, 30 record-epochs, 15 records/s, 1:05 left"
    assert len([line for line in said if line.startswith("training: ")]) == 7
    assert said[-2:] == ["a note", "training: done in 60.0 s"]


@pytest.mark.parametrize(("shards", "stages"), [(4, 12), (1_000, 10_000)])
def test_a_terminal_gets_one_line_that_fits(monkeypatch, shards, stages):
    import io

    from rich.console import Console

    written = io.StringIO()
    monkeypatch.setattr("rich.console.Console", lambda **_: Console(file=written, force_terminal=True, width=100))
    bar = reporting.Bar()
    bar.begin("training", stages * 1_000)
    for number in range(1, shards + 1):
        bar.advance(stages * 1_000 // shards)
        bar.stages(number * stages // shards, stages)
    bar._bar.refresh()
    bar.note("a [note] about shard 3")
    bar.end()
    text = written.getvalue()
    assert f"{stages:,}/{stages:,} stages" in text
    assert "a [note] about shard 3" in text
    assert "…" not in text
