from __future__ import annotations

import warnings
from collections import namedtuple

import pytest

from secateur.costs import neighbours
from secateur.costs.neighbours import share_of_others, watched

START = {"user": 100.0, "system": 10.0, "idle": 50.0, "iowait": 1.0, "steal": 0.0, "guest": 5.0}
Times = namedtuple("Times", START)


def test_share_by_hand() -> None:
    # 10 seconds of two processors: 12 busy, of which 9 are our own; what guests take is in "user" already
    later = {"user": 111.0, "system": 10.5, "idle": 57.0, "iowait": 2.0, "steal": 0.5, "guest": 8.0}
    assert share_of_others(START, later, 9.0) == pytest.approx(3 / 20)


def test_our_own_time_is_not_others() -> None:
    assert share_of_others(START, START | {"user": 104.0, "idle": 54.0}, 4.01) == 0


def test_too_short_to_judge() -> None:
    assert share_of_others(START, START | {"user": 100.4}, 0.0) == 0


@pytest.mark.parametrize(("others", "warned"), [(1.0, False), (3.0, True)])
def test_warns_of_others(monkeypatch: pytest.MonkeyPatch, others: float, warned: bool) -> None:
    later = START | {"user": 100.0 + others, "idle": 60.0 - others}
    counts = iter([Times(**START), Times(**later)])
    monkeypatch.setattr(neighbours.psutil, "cpu_times", lambda: next(counts))
    monkeypatch.setattr(neighbours.time, "process_time", lambda: 0.0)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        with watched():
            pass
    assert [("30%" in str(w.message)) for w in found] == [True] * warned
