"""Where a step's time went: each instant counts once."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from mars_trainer.timeline import STAGES, stage_seconds

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
