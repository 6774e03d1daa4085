"""Recipe `paper` pays for what an answer knows: attempts to get more, and honest answers beside them."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gaming_answers
import gaming_boxes
from conftest import Tables
from gaming import Attempt, thought_and
from gaming_boxes import PIXELS, TWO, listed
from mars_reward.registry import score
from mars_shared.contracts import BoxesTruth, BoxFrame, Score, ScoreItem, TextTruth

ATTEMPTS: list[Attempt] = [*gaming_answers.ATTEMPTS, *gaming_boxes.ATTEMPTS]
FAMILIES = list(dict.fromkeys(attempt.family for attempt in ATTEMPTS))


def paper(completion: str, truth: TextTruth | BoxesTruth, frame: BoxFrame | None = None) -> Score:
    return score(ScoreItem(completion=completion, truth=truth, frame=frame), "paper")


def says(answer: str, truth: str) -> bool:
    """Whether an answer of perfect format is right."""
    return paper(thought_and(answer), TextTruth(text=truth)).parts["accuracy"] == 1


@pytest.mark.parametrize("attempt", ATTEMPTS, ids=str)
def test_an_attempt_gets_no_more_than_it_knows(attempt: Attempt) -> None:
    reward = paper(attempt.completion, attempt.truth, attempt.frame).reward
    assert 0 <= reward <= attempt.highest + 1e-9


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_of_tricks_stays_within_its_bound(family: str, tables: Tables) -> None:
    attempts = [attempt for attempt in ATTEMPTS if attempt.family == family]
    seen = max(paper(attempt.completion, attempt.truth, attempt.frame).reward for attempt in attempts)
    bound = max(attempt.highest for attempt in attempts)
    task = "vqa" if isinstance(attempts[0].truth, TextTruth) else "grounding"
    tables.add(
        "gaming answers", task=task, family=family, attempts=f"{len(attempts)}", highest=f"{seen:.3f}", bound=f"{bound:.3f}"
    )
    assert seen <= bound + 1e-9


@pytest.mark.parametrize(("truth", "answer"), gaming_answers.HONEST)
def test_an_honest_answer_keeps_its_full_reward(truth: str, answer: str) -> None:
    assert paper(thought_and(answer), TextTruth(text=truth)).reward == 1.5


@pytest.mark.parametrize(("truth", "completion"), gaming_boxes.HONEST)
def test_honest_boxes_keep_their_full_reward(truth: BoxesTruth, completion: str) -> None:
    assert paper(completion, truth, PIXELS).reward == pytest.approx(1.75, abs=1e-12)


EXCLUSIVE = [
    ["Yes", "No"],
    ["A", "B", "C", "D"],
    ["2", "3", "-2", "12", "two hundred"],
    ["orange", "white", "orange and white or white and orange", "black"],
]
"""Truths of which at most one can be meant."""
JOINTS = [
    " ",
    "",
    ", ",
    ",",
    "/",
    " and ",
    " or ",
    " & ",
    "-",
    " - ",
    "\n",
    ". ",
    ") ",
    " (",
    ": ",
    "; ",
    " not ",
    "\u200b",
    "\u2014",
]
FILLERS = ["the answer is", "maybe", "not", "the", "a", "...", "*", "(", "option", "?", "<", "+", "twenty"]


def phrases(words: list[str]) -> st.SearchStrategy[str]:
    """The words in any number and order with any joints between."""
    pieces = st.lists(st.tuples(st.sampled_from([*words, *FILLERS]), st.sampled_from(JOINTS)), min_size=1, max_size=6)
    return pieces.map(lambda found: "".join(word + joint for word, joint in found))


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_no_answer_is_right_for_two_truths_that_exclude_each_other(data: st.DataObject) -> None:
    truths = data.draw(st.sampled_from(EXCLUSIVE))
    answer = data.draw(phrases(truths))
    assert sum(says(answer, truth) for truth in truths) <= 1


@settings(max_examples=400, deadline=None)
@given(phrases(["Yes", "No", "yes.", "no,"]))
def test_an_answer_that_says_yes_and_no_is_never_right(answer: str) -> None:
    if {"yes", "no"} <= set(re.split("[^a-z]+", answer.lower())):
        assert not says(answer, "Yes") and not says(answer, "No")


WITHOUT = [
    ("Yes", "no A B 7 cat y e s maybe true"),
    ("B", "A C D yes 8 cat bb option beta"),
    ("7", "1 17 70 six eight 0.7 vii yes A"),
    ("two or 2", "1 3 22 12 one three too to or"),
    ("orange and white or white and orange", "orange red and or black o w white"),
    ("one north link", "one north link two a n"),
]
"""A truth, and words none of which says it alone; in the last two cases the right ones together could."""


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_no_text_without_the_truths_words_is_right(data: st.DataObject) -> None:
    truth, words = data.draw(st.sampled_from(WITHOUT[:4]))
    assert not says(data.draw(phrases(words.split())), truth)


@pytest.mark.parametrize(("truth", "words"), WITHOUT)
def test_no_single_word_is_right_for_a_truth_that_it_does_not_say(truth: str, words: str) -> None:
    assert not [word for word in words.split() if says(word, truth)]


coordinates = st.integers(-20, 120)
listed_boxes = st.lists(st.tuples(*[coordinates] * 4), min_size=1, max_size=16)


def iou(left: tuple[float, ...], right: tuple[float, ...]) -> float:
    """Of two boxes that are not inside out, by the areas."""
    width = min(left[2], right[2]) - max(left[0], right[0])
    height = min(left[3], right[3]) - max(left[1], right[1])
    overlap = max(width, 0) * max(height, 0)
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (left, right))
    return overlap / (areas - overlap)


@settings(max_examples=200, deadline=None)
@given(listed_boxes)
def test_no_list_of_boxes_gets_more_than_its_best_box_for_each_object(boxes: list[tuple[int, int, int, int]]) -> None:
    real = [box for box in boxes if box[0] < box[2] and box[1] < box[3]]
    best = [max((iou(box, thing) for box in real), default=0.0) for thing in TWO.boxes]
    assert paper(listed(boxes), TWO, PIXELS).reward <= 0.75 + sum(best) / 2 + 1e-9


@settings(max_examples=200, deadline=None)
@given(listed_boxes, st.integers(2, 12))
def test_repeating_a_box_never_pays(boxes: list[tuple[int, int, int, int]], times: int) -> None:
    once = paper(listed(boxes[:1]), TWO, PIXELS).reward
    # A second copy may take the second object; the first got the better of the two.
    assert paper(listed(boxes[:1] * times), TWO, PIXELS).reward <= 0.75 + 2 * (once - 0.75) + 1e-9


LONG = [
    "-",
    "- ",
    "-\u3000",
    "1",
    ",111",
    "1,111",
    "1.",
    "a-",
    "a) ",
    "a. ",
    "yes no ",
    "_",
    "<",
    "e\u0301",
    "<answer>",
    "[",
    "```json",
]


@pytest.mark.parametrize("tail", ["", "x)"])
@pytest.mark.parametrize("piece", LONG)
def test_a_hundred_kilobytes_of_one_piece_is_scored_and_wrong(piece: str, tail: str) -> None:
    text = piece * (2**17 // len(piece)) + tail
    assert not [truth for truth in ("7", "Yes", "B", "one north link") if says(text, truth)]
    assert paper(thought_and(text), TWO, PIXELS).parts["iou"] == 0


def test_what_is_listed_around_the_objects_counts_as_json_reads_it() -> None:
    entries = [{"bbox_2d": list(box), "label": "x" * 1000} for box in TWO.boxes]
    assert paper(thought_and(f"```json{json.dumps(entries)}```"), TWO, PIXELS).reward == 1.75
