"""Rewards of visual question answering: a normalised match that short answers cannot game."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mars_reward.rewards.answers import matches
from mars_reward.rewards.vqa import VqaScore, score_vqa
from mars_shared.contracts import TextTruth

RIGHT = [
    ("7", "7"),
    (" 7. ", "7"),
    ("seven", "7"),
    ("The answer is 7", "7"),
    ("1,000", "1000"),
    ("2.0", "2"),
    ("Yes", "yes"),
    ("YES.", "Yes"),
    ("Yes, a cat", "Yes"),
    ("No, either blue or green", "No"),
    ("The answer is Yes", "Yes"),
    ("B", "B"),
    ("b", "B"),
    ("(B)", "B"),
    ("B.", "B"),
    ("B. Tokyo", "B"),
    ("B) Pride or prejudice", "B"),
    ("Option B", "B"),
    ("The correct answer is: (b)", "B"),
    ("two", "two or 2"),
    ("2", "two or 2"),
    ("TEN OR 10", "ten or 10"),
    ("twenty-one", "twenty-one or 21"),
    ("Twenty one.", "21"),
    ("white and orange", "orange and white or white and orange"),
    ("The answer is dunkin donuts", "dunkin donuts"),
    ("ONE NORTH LINK", "one north link"),
    ("the cat", "a cat"),
    ("-3", "-3"),
    ("+", "+"),
    ("or", "or"),
    ("東京", "東京"),
]

WRONG = [
    ("17", "7"),
    ("7", "17"),
    ("-3", "3"),
    ("7 or 8", "7"),
    ("a", "Yes, a cat"),
    ("a", "cat"),
    ("yes", "Yes, a cat"),
    ("e", "yes"),
    ("yes or no", "yes"),
    ("no or yes", "yes"),
    ("no", "yes"),
    ("not yes", "yes"),
    ("maybe yes", "yes"),
    ("not white", "white"),
    ("white", "not white"),
    ("red", "D"),
    ("a cat", "A"),
    ("A or B or C or D", "A"),
    ("A B C D", "A"),
    ("A, B, C, D", "A"),
    ("not A", "A"),
    ("B", "A"),
    ("blue", "blue and green"),
    ("blue green teal", "blue or green or teal"),
    ("blue or red", "blue or green or teal"),
    ("", "yes"),
    ("...", "yes"),
    ("or", "yes"),
    ("the answer is", "yes"),
]


@pytest.mark.parametrize(("answer", "truth"), RIGHT)
def test_an_answer_that_says_the_truth_in_other_clothes_is_right(answer: str, truth: str) -> None:
    assert matches(answer, truth)


@pytest.mark.parametrize(("answer", "truth"), WRONG)
def test_an_answer_that_only_shares_letters_or_hedges_is_wrong(answer: str, truth: str) -> None:
    assert not matches(answer, truth)


@given(st.integers(min_value=0, max_value=99), st.integers(min_value=0, max_value=99))
def test_two_digit_numbers_match_only_themselves(left: int, right: int) -> None:
    assert matches(str(left), str(right)) == (left == right)


@given(
    st.lists(st.sampled_from(["cat", "seven", "7", "yes", "no", "one-way", "'s", "-", "or", "the", "."]), min_size=1).map(
        " ".join
    )
)
def test_any_text_matches_itself_in_capitals(text: str) -> None:
    assert matches(text.upper(), text)


def test_the_total_is_half_for_format_and_one_for_accuracy() -> None:
    score = score_vqa("<think>r</think><answer>Two.</answer>", TextTruth(text="two or 2"))
    assert score == VqaScore(format=0.5, accuracy=1.0, parsed=True)


def test_a_wrong_answer_keeps_its_format() -> None:
    score = score_vqa("<think>r</think><answer>17</answer>", TextTruth(text="7"))
    assert score == VqaScore(format=0.5, accuracy=0.0, parsed=True)


@pytest.mark.parametrize("completion", ["", "7", "<think>7</think>", "<answer></answer>", "<answer>  </answer>", "<answer>7"])
def test_what_stands_outside_a_whole_answer_tag_is_no_answer(completion: str) -> None:
    score = score_vqa(completion, TextTruth(text="7"))
    assert (score.accuracy, score.parsed) == (0.0, False)


def test_listing_answers_in_many_tags_counts_the_first_and_loses_format() -> None:
    score = score_vqa("".join(f"<answer>{digit}</answer>" for digit in range(10)), TextTruth(text="7"))
    assert score == VqaScore(format=0.0, accuracy=0.0, parsed=True)


@pytest.mark.parametrize(
    "piece",
    ["or ", "a", " ", "\u3000", "-", "1,000", "1.", ".", "twenty one ", "the answer is ", "yes or no ", "(c). ", "é\u0301"],
)
@pytest.mark.parametrize("truth", ["7", "yes", "B", "one north link"])
def test_a_megabyte_of_answer_is_judged_in_linear_time(piece: str, truth: str) -> None:
    text = piece * (2**20 // len(piece))
    assert score_vqa(f"<answer>{text}</answer>", TextTruth(text=truth)).accuracy == 0
