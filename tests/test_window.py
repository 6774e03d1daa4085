"""Order and admission of groups: what is dispatched when, and which step trains on it."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mars_trainer.window import Window


def make_window(
    *, batch: int = 3, steps: int = 4, max_staleness: int = 0, rounds: int = 3, dropped: frozenset[int] = frozenset()
) -> Window[int]:
    return Window(batch=batch, steps=steps, max_staleness=max_staleness, rounds=rounds, keep=lambda index: index not in dropped)


def dispatch_all(window: Window[int]) -> list[int]:
    indices = []
    while window.may_dispatch:
        indices.append(window.dispatch())
    return indices


def test_without_staleness_only_the_groups_of_the_current_step_are_dispatched() -> None:
    window = make_window()
    assert dispatch_all(window) == [0, 1, 2]
    for index in (2, 0, 1):
        assert not window.settle()
        window.arrive(index, index)
    assert window.settle() and window.kept == [0, 1, 2]
    assert not window.may_dispatch
    window.advance()
    assert dispatch_all(window) == [3, 4, 5]


def test_staleness_lets_the_groups_of_later_steps_be_dispatched_up_to_the_runs_end() -> None:
    window = make_window(batch=2, steps=3, max_staleness=1)
    assert dispatch_all(window) == [0, 1, 2, 3]
    for index in (3, 2, 1, 0):
        window.arrive(index, index)
    assert window.settle() and window.kept == [0, 1] and window.outstanding == (2, 3)
    window.advance()
    assert dispatch_all(window) == [4, 5]
    assert window.settle() and window.kept == [2, 3]
    window.advance()
    assert dispatch_all(window) == [], "six places are all that three steps have"


def test_a_fast_group_waits_for_the_slow_one_before_it() -> None:
    window = make_window(batch=1, steps=9, max_staleness=2)
    assert dispatch_all(window) == [0, 1, 2]
    window.arrive(1, 1)
    window.arrive(2, 2)
    assert not window.settle()
    window.arrive(0, 0)
    assert window.settle() and window.kept == [0]


def test_a_dropped_or_dead_group_gives_its_place_to_the_next_index() -> None:
    window = make_window(dropped=frozenset({1}))
    dispatch_all(window)
    window.arrive(0, 0)
    window.arrive(1, 1)
    window.bury(2)
    assert not window.settle() and window.dropped == [1]
    assert dispatch_all(window) == [3, 4]
    window.arrive(4, 4)
    window.arrive(3, 3)
    assert window.settle() and window.kept == [0, 3, 4]


def test_refills_are_limited_and_then_the_step_trains_on_what_there_is() -> None:
    window = make_window(batch=2, rounds=2, dropped=frozenset(range(1, 9)))
    for expected in ([0, 1], [2], [3]):
        assert dispatch_all(window) == expected
        for index in expected:
            window.arrive(index, index)
        done = window.settle()
    assert done and window.kept == [0] and window.dropped == [1, 2, 3]
    window.advance()
    assert dispatch_all(window) == [4, 5], "the step that stayed short has closed its places"


def test_with_staleness_a_short_step_takes_from_the_groups_of_later_steps_first() -> None:
    window = make_window(batch=2, steps=9, max_staleness=1, rounds=1, dropped=frozenset({0, 1}))
    assert dispatch_all(window) == [0, 1, 2, 3]
    for index in range(4):
        window.arrive(index, index)
    assert window.settle() and window.kept == [2, 3], "no refill is allowed, and the step is full all the same"
    window.advance()
    assert dispatch_all(window) == [4, 5]


def test_a_place_is_never_handed_out_twice() -> None:
    window = make_window()
    dispatch_all(window)
    with pytest.raises(ValueError, match="no place for dispatch index 3"):
        window.dispatch()


def test_what_was_dispatched_before_a_restart_keeps_its_order_and_its_places() -> None:
    window: Window[int] = Window(
        batch=2, steps=9, max_staleness=1, rounds=1, keep=lambda _: True, step=3, next_index=12, dispatched=(8, 10)
    )
    assert dispatch_all(window) == [12, 13]
    for index in (13, 12, 10, 8):
        window.arrive(index, index)
    assert window.settle() and window.kept == [8, 10] and window.outstanding == (12, 13)


@dataclass
class Life:
    """A run with replicas of any speed: groups arrive in any order, some are dropped, some die."""

    window: Window[int]
    choices: random.Random
    dead: frozenset[int]
    dispatched_at: dict[int, int] = field(default_factory=dict)
    trained: list[list[int]] = field(default_factory=list)
    lag: list[int] = field(default_factory=list)
    most_open: int = 0

    def live(self, steps: int) -> None:
        under_way: list[int] = []
        for step in range(steps):
            while not self.window.settle():
                while self.window.may_dispatch:
                    index = self.window.dispatch()
                    self.dispatched_at[index] = step
                    under_way.append(index)
                self.most_open = max(self.most_open, len(self.window.outstanding) + len(self.window.kept))
                if not under_way:
                    continue
                index = under_way.pop(self.choices.randrange(len(under_way)))
                if index in self.dead:
                    self.window.bury(index)
                else:
                    self.window.arrive(index, index)
            self.lag += [step - self.dispatched_at[index] for index in self.window.kept]
            self.trained.append(list(self.window.kept))
            self.window.advance()


indices = st.frozensets(st.integers(min_value=0, max_value=60), max_size=40)


@given(
    batch=st.integers(1, 4),
    max_staleness=st.integers(0, 3),
    rounds=st.integers(1, 3),
    dropped=indices,
    dead=indices,
    seed=st.integers(0, 2**16),
)
def test_a_group_is_never_older_than_the_bound_whatever_arrives_when(
    batch: int, max_staleness: int, rounds: int, dropped: frozenset[int], dead: frozenset[int], seed: int
) -> None:
    steps = 6
    window = make_window(batch=batch, steps=steps, max_staleness=max_staleness, rounds=rounds, dropped=dropped)
    life = Life(window, random.Random(seed), dead)
    life.live(steps)
    flat = [index for step in life.trained for index in step]
    assert all(0 <= lag <= max_staleness for lag in life.lag)
    assert flat == sorted(set(flat)), "in dispatch order, each once"
    assert not set(flat) & (dropped | dead)
    assert life.most_open <= (max_staleness + 1) * batch
    gone = set(life.dispatched_at) - set(flat) - dropped - dead
    assert gone == set(window.outstanding) == set(), "nothing that arrived was thrown away"


@given(
    batch=st.integers(1, 4),
    dropped=indices,
    dead=indices,
    seeds=st.tuples(st.integers(0, 2**16), st.integers(0, 2**16)),
)
def test_without_staleness_what_is_trained_does_not_depend_on_who_is_faster(
    batch: int, dropped: frozenset[int], dead: frozenset[int], seeds: tuple[int, int]
) -> None:
    lives = [Life(make_window(batch=batch, steps=6, dropped=dropped), random.Random(seed), dead) for seed in seeds]
    for life in lives:
        life.live(6)
    assert lives[0].trained == lives[1].trained
    assert set(lives[0].dispatched_at) == set(lives[1].dispatched_at)
