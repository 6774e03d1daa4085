"""Where a step's time went: each instant counts once."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mars_trainer.timeline import REMEMBERED, STAGES, Efficiency, stage_seconds

instants = st.integers(-5, 25).map(float)
intervals = st.lists(st.tuples(instants, instants), max_size=5)


def test_overlapping_intervals_of_a_stage_count_once() -> None:
    # Generation covers 1 to 6 in two overlapping pieces; training 6 to 9 comes first where both are (6 to 7).
    seconds = stage_seconds((0, 10), {"training": [(6, 9)], "generation": [(1, 5), (4, 7)]})
    assert seconds == {"training": 3, "weight_push": 0, "generation": 5, "reward": 0, "waiting": 2}


def test_an_instant_belongs_to_the_first_stage_that_covers_it() -> None:
    everywhere = [(0.0, 10.0)]
    stages = {"reward": everywhere, "generation": [(2.0, 10.0)], "weight_push": [(4.0, 10.0)], "training": [(7.0, 10.0)]}
    assert stage_seconds((0, 10), stages) == {"training": 3, "weight_push": 3, "generation": 2, "reward": 2, "waiting": 0}


def test_only_the_window_counts() -> None:
    seconds = stage_seconds((10, 20), {"generation": [(0, 12), (19, 40), (30, 40)], "training": [(0, 10), (20, 21)]})
    assert seconds == {"training": 0, "weight_push": 0, "generation": 3, "reward": 0, "waiting": 7}


def test_where_nothing_happens_everything_waits() -> None:
    assert stage_seconds((3, 7), {}) == {"training": 0, "weight_push": 0, "generation": 0, "reward": 0, "waiting": 4}
    assert stage_seconds((3, 3), {"training": [(0, 9)]})["waiting"] == 0


@given(
    start=st.integers(0, 10),
    length=st.integers(0, 10),
    stages=st.dictionaries(st.sampled_from(STAGES[:-1]), intervals),
)
def test_the_stages_share_the_window_second_by_second(
    start: int, length: int, stages: dict[str, list[tuple[float, float]]]
) -> None:
    # All edges are whole numbers, so the middle of each second tells to whom it belongs.
    expected = dict.fromkeys(STAGES, 0.0)
    for second in range(start, start + length):
        middle = second + 0.5
        owner = next((s for s in STAGES[:-1] if any(a <= middle < b for a, b in stages.get(s, []))), "waiting")
        expected[owner] += 1
    actual = stage_seconds((start, start + length), stages)
    assert actual == expected and math.isclose(sum(actual.values()), length)


def test_the_efficiency_is_the_mean_over_workers_of_what_their_work_covers() -> None:
    # The trainer works 3 of 10 seconds; a replica 1 to 5 and 4 to 7, together 6; another before the window and for its last 2.
    work = {"trainer": [(6, 9)], "rollout-0": [(1, 5), (4, 7)], "rollout-1": [(-5, 0), (8, 12)]}
    assert Efficiency().share((0, 10), work) == pytest.approx((3 + 6 + 2) / 30)
    assert Efficiency().share((0, 10), {"trainer": [(-5, 20), (2, 3)]}) == 1


def test_work_that_ends_in_a_later_window_counts_there_and_once() -> None:
    efficiency = Efficiency()
    assert efficiency.share((0, 10), {"trainer": [(0, 4)], "rollout-0": [(0, 6)]}) == pytest.approx((4 + 6) / 20)
    # Known only now: 5 to 12, of which 5 to 6 was counted; from 12 to 16, where no window is, nothing counts.
    second = efficiency.share((16, 26), {"trainer": [(20, 26)], "rollout-0": [(5, 20)]})
    assert second == pytest.approx((6 + (4 + 4)) / 20)
    # Nothing came of the replica: it is at work on something long, or idle.
    assert efficiency.share((26, 36), {"trainer": [(26, 36)]}) == pytest.approx(10 / 20)
    assert efficiency.share((36, 46), {"trainer": [], "rollout-0": [(20, 46)]}) == pytest.approx((6 + 10 + 10) / 20)


def test_a_worker_of_whom_nothing_comes_any_more_is_forgotten() -> None:
    efficiency = Efficiency()
    efficiency.share((0, 10), {"trainer": [(0, 10)], "rollout-0": [(0, 10)]})
    shares = [efficiency.share((10 * n, 10 * n + 10), {"trainer": [(10 * n, 10 * n + 10)]}) for n in range(1, REMEMBERED + 2)]
    assert shares == [0.5] * REMEMBERED + [1.0]
