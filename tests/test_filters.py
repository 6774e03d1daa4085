"""DAPO's filters by hand."""

from __future__ import annotations

import pytest

from mars_trainer.algorithm.filters import has_signal, overlong_punishment


@pytest.mark.parametrize(
    ("rewards", "expected"), [((1, 0), True), ((1, 1, 1), False), ((0.5,), False), ((), False), ((0, 0, 1e-9), True)]
)
def test_rewards_that_differ_are_a_signal(rewards: tuple[float, ...], expected: bool) -> None:
    assert has_signal(rewards) is expected


@pytest.mark.parametrize(
    ("length", "expected"),
    # 100 tokens at most, a buffer of 40: nothing up to 60, -0.5 at 80, -1 at 100 and, were it possible, beyond.
    [(0, 0.0), (59, 0.0), (60, 0.0), (61, -0.025), (80, -0.5), (99, -0.975), (100, -1.0), (120, -1.0)],
)
def test_overlong_answers_are_punished_softly(length: int, expected: float) -> None:
    assert overlong_punishment(length, max_length=100, buffer=40) == pytest.approx(expected)
    assert overlong_punishment(length, max_length=100, buffer=40, penalty=2.0) == pytest.approx(2 * expected)


@pytest.mark.parametrize("buffer", [0, -1, 101])
def test_a_buffer_outside_the_length_is_an_error(buffer: int) -> None:
    with pytest.raises(ValueError, match=f"overlong buffer is {buffer} tokens; expected 1 to max_length = 100"):
        overlong_punishment(50, max_length=100, buffer=buffer)
