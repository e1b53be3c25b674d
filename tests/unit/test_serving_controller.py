"""The speed-up that serving chooses: numbers worked out by hand, with a clock that the test turns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from secateur.errors import SecateurError
from secateur.serving.controller import Controller, Row
from secateur.serving.table import rows_of, speedups_of

ROWS = [Row(1.0, 1.0), Row(2.0, 2.0), Row(4.0, 3.5)]


def controller(target: float | None = 0.05) -> Controller:
    """One that has seen 1,000 tokens take 20 ms: 20 µs each."""
    found = Controller(ROWS, target)
    found.computed(1000, 0.02)
    return found


def test_waits_follow_measured_factors() -> None:
    made = controller()
    assert made.wait(7000) == pytest.approx(7000 * 20e-6 / 3.5)
    assert [made.wait(1000, place) for place in range(3)] == pytest.approx([0.02, 0.01, 0.02 / 3.5])
    assert Controller(ROWS, 0.05).wait(7000) == 0


def test_later_batches_weigh_more() -> None:
    made = controller()
    made.computed(500, 0.04)
    assert made.wait(1, 0) == pytest.approx((0.9 * 0.02 + 0.04) / (0.9 * 1000 + 500))
    made.place = 1  # here half the time is that of the first row
    made.computed(1000, 0.01)
    assert made.wait(1, 0) == pytest.approx((0.9 * 0.058 + 0.02) / (0.9 * 1400 + 1000))


def test_it_goes_up_at_once_as_far_as_needed() -> None:
    made = controller()
    assert made.choose(0, 2500) == 1  # 50 ms
    assert made.choose(0, 4000) == 2  # 80 ms, or 40
    assert made.choose(0, 6000) == 4  # 60 ms, or 34
    assert made.choose(0, 100_000) == 4  # nothing is faster
    assert controller().choose(0, 100_000) == 4
    assert controller(None).choose(0, 100_000) == 1


def test_it_goes_up_by_one_row_for_measured_latencies() -> None:
    made = controller()
    for _ in range(19):
        made.answered(0, 0.06)
    assert (made.percentile(), made.choose(0, 0)) == (0, 1)  # too few to say
    made.answered(0, 0.06)
    assert made.percentile() == 0.06
    assert [made.choose(0, 0), made.choose(0, 0)] == [2, 2]  # those of another row say nothing


def test_percentile_of_a_window() -> None:
    made = controller()
    for number in range(1, 101):
        made.answered(1, number / 1000)
    assert made.percentile() == 0.095
    made.choose(5.9, 0)
    assert made.percentile() == 0  # after going up; and after five seconds in any case
    made.answered(6, 0.01)
    made.choose(11, 0)
    assert made.percentile() == 0


def fast() -> Controller:
    made = controller()
    assert made.choose(10, 100_000) == 4
    return made


def test_it_comes_down_after_a_calm_while() -> None:
    made = fast()
    assert [made.choose(now, 100) for now in (20, 24.9, 25)] == [4, 4, 1]


def test_what_is_not_calm_starts_the_while_anew() -> None:
    """3,000 tokens are 30 ms at the second row: above half the target."""
    made = fast()
    assert [made.choose(now, n) for now, n in ((20, 0), (23, 3000), (24, 0), (28.9, 0), (29, 0))] == [4, 4, 4, 4, 1]
    made = fast()
    for _ in range(20):
        made.answered(22, 0.03)
    assert [made.choose(now, 0) for now in (20, 23, 26.9)] == [4, 4, 4]
    assert [made.choose(now, 0) for now in (27, 31.9, 32)] == [4, 4, 1]  # without those answers


def test_it_comes_down_no_further_than_what_arrives_allows() -> None:
    """200,000 tokens in five seconds keep the first row busy for 4 s, the second for 2; 3.5 are allowed."""
    made = fast()
    for now in range(15, 21):
        made.arrived(now, 40_000)
        found = made.choose(now, 0)
    assert found == 2
    for now in range(21, 40):
        made.arrived(now, 40_000)
        assert made.choose(now, 0) == 2
    assert [made.choose(now, 0) for now in (42, 46.9, 47)] == [2, 2, 1]


def table(folder: Path, rows: list[dict[str, Any]]) -> Path:
    (folder / "dial.json").write_text(json.dumps({"rows": rows, "setting": {"tokens": 32}}))
    return folder


def row(speedup: float, **metrics: float) -> dict[str, Any]:
    return {"speedup": speedup} | ({"metrics": metrics} if metrics else {})


def test_speedups_of_a_table(tmp_path: Path) -> None:
    assert speedups_of(tmp_path, None) == []
    table(tmp_path, [row(1, accuracy=0.9, f1=0.1), row(3, accuracy=0.87), row(2, accuracy=0.88), row(1.5)])
    assert speedups_of(tmp_path, 32) == [1, 1.5, 2, 3]
    assert speedups_of(tmp_path, 32, 0.88) == [1, 2]
    with pytest.raises(SecateurError, match=r"keeps the floor of 0.95: the best has 0.9\."):
        speedups_of(tmp_path, 32, 0.95)
    with pytest.raises(SecateurError, match="counts at 32 tokens and the dial at 64: run .*, without --tokens"):
        speedups_of(tmp_path, 64)


def test_tables_that_do_not_serve(tmp_path: Path) -> None:
    with pytest.raises(SecateurError, match="has none: compress with 'late' first"):
        speedups_of(tmp_path, None, 0.88)
    for floor in (0.88, None):
        with pytest.raises(SecateurError, match=rf"run `secateur dial {tmp_path} --task ...` first"):
            speedups_of(tmp_path, 32, floor)
    with pytest.raises(SecateurError, match="has none: run `secateur dial"):
        speedups_of(table(tmp_path, [row(1), row(2)]), 32, 0.88)
    for text in ("{", "[]", '{"rows": []}', '{"rows": [1], "setting": {"tokens": 32}}'):
        (tmp_path / "dial.json").write_text(text)
        with pytest.raises(SecateurError, match="is damaged"):
            speedups_of(tmp_path, 32)


def test_rows_are_faster_and_faster() -> None:
    """1.25 took longer than the first, 2 as long as 1.5."""
    rows = rows_of([1, 1.25, 1.5, 2, 3], [4, 5, 2.5, 2.5, 2])
    assert rows == [Row(1, 1), Row(1.5, 1.6), Row(3, 2)]
