"""Grounding rewards: boxes, frames, assignment, and completions that try to cheat."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mars_reward.registry import score
from mars_reward.rewards.grounding import (
    Box,
    max_predictions,
    mean_assigned_iou,
    read_boxes,
    score_grounding,
)
from mars_shared.contracts import BoxesTruth, BoxFrame, FrameKind, ScoreItem, TextTruth
from mars_shared.errors import InputError

SQUARE = BoxesTruth(boxes=((0, 0, 10, 10),), width_px=100, height_px=100)
PIXELS = BoxFrame(kind=FrameKind.ORIGINAL, width=100, height=100)


def answer(boxes: list[Any]) -> str:
    return raw_answer(json.dumps([{"bbox_2d": box, "label": "person"} for box in boxes]))


def raw_answer(text: str) -> str:
    return f"<think>r</think><answer>```json\n{text}\n```</answer>"


def test_overlapping_squares_get_their_overlap_over_their_union() -> None:
    # Overlap 5 x 5 = 25, union 100 + 100 - 25 = 175.
    truth = BoxesTruth(boxes=((5, 5, 15, 15),), width_px=100, height_px=100)
    score = score_grounding(answer([[0, 0, 10, 10]]), truth, PIXELS)
    assert score.iou == pytest.approx(25 / 175, abs=1e-12)
    assert (score.format, score.parsed) == (0.75, True)


@pytest.mark.parametrize("recipe", ["paper", "released"])
def test_a_score_carries_the_boxes_that_were_answered_in_original_pixels(recipe: str) -> None:
    half = BoxFrame(kind=FrameKind.RESIZED, width=50, height=50)
    given = answer([[1, 2, 3, 4], [3, 3, 1, 1], "junk"])
    assert score(ScoreItem(completion=given, truth=SQUARE, frame=half), recipe).boxes == ((2, 4, 6, 8),)
    assert score(ScoreItem(completion="no boxes", truth=SQUARE, frame=half), recipe).boxes == ()
    assert score(ScoreItem(completion=given, truth=TextTruth(text="two")), recipe).boxes == ()


def test_the_assignment_is_optimal_where_the_greedy_one_is_not() -> None:
    # Overlaps: p1 with o1 80/100, with o2 60/80; p2 with o1 100/200, with o2 60/200.
    # Greedy takes 0.8 + 0.3; the best is 0.75 + 0.5, over 2 objects.
    predicted: list[Box] = [(0, 0, 10, 8), (0, 0, 10, 20)]
    objects: tuple[Box, ...] = ((0, 0, 10, 10), (0, 0, 10, 6))
    assert mean_assigned_iou(predicted, objects) == pytest.approx(0.625, abs=1e-12)


def test_an_object_without_prediction_counts_zero_in_the_mean() -> None:
    objects: tuple[Box, ...] = ((0, 0, 10, 10), (50, 50, 60, 60), (80, 80, 90, 90))
    assert mean_assigned_iou([(50, 50, 60, 60)], objects) == pytest.approx(1 / 3, abs=1e-12)


def test_a_prediction_is_used_for_one_object_only() -> None:
    assert mean_assigned_iou([(0, 0, 10, 10)], ((0, 0, 10, 10), (0, 0, 10, 10))) == 0.5


def test_low_overlaps_count_without_a_threshold() -> None:
    # Overlap 1 x 10 of 10 x 10: 10 / 100.
    assert mean_assigned_iou([(0, 0, 1, 10)], ((0, 0, 10, 10),)) == pytest.approx(0.1, abs=1e-12)


@pytest.mark.parametrize(
    ("frame", "box"),
    [
        (BoxFrame(kind=FrameKind.ORIGINAL, width=1280, height=1024), [640, 256, 1280, 768]),
        (BoxFrame(kind=FrameKind.RESIZED, width=644, height=504), [322, 126, 644, 378]),
        (BoxFrame(kind=FrameKind.PER_MILLE, width=1000, height=1000), [500, 250, 1000, 750]),
    ],
)
def test_boxes_are_converted_from_their_frame_to_original_pixels(frame: BoxFrame, box: list[int]) -> None:
    # The right half between a quarter and three quarters of the height, in every frame.
    truth = BoxesTruth(boxes=((640, 256, 1280, 768),), width_px=1280, height_px=1024)
    assert score_grounding(answer([box]), truth, frame).iou == pytest.approx(1.0, abs=1e-12)


def test_the_same_numbers_in_another_frame_are_another_box() -> None:
    # In a frame of 50 x 200 the box (0, 0, 10, 10) is (0, 0, 20, 5) in pixels: 50 / (100 + 100 - 50).
    frame = BoxFrame(kind=FrameKind.RESIZED, width=50, height=200)
    assert score_grounding(answer([[0, 0, 10, 10]]), SQUARE, frame).iou == pytest.approx(1 / 3, abs=1e-12)


def test_a_missing_frame_is_an_error_and_never_a_guess() -> None:
    with pytest.raises(InputError, match="frame is missing"):
        score_grounding(answer([[0, 0, 10, 10]]), SQUARE, None)


@pytest.mark.parametrize("box", [(0, 0, 1e-200, 1e-200), (0, 0, 1e9, 10)])
def test_a_truth_without_area_or_out_of_bounds_is_an_error_that_names_the_box(box: Box) -> None:
    truth = BoxesTruth(boxes=((0, 0, 10, 10), box), width_px=100, height_px=100)
    with pytest.raises(InputError, match="truth box 1"):
        score_grounding(answer([[0, 0, 10, 10]]), truth, PIXELS)


@pytest.mark.parametrize(
    "entry",
    [
        '{"bbox_2d": [0, 0, NaN, 10]}',
        '{"bbox_2d": [0, 0, Infinity, 10]}',
        '{"bbox_2d": [0, 0, 1e999, 10]}',
        '{"bbox_2d": [-Infinity, 0, 10, 10]}',
        '{"bbox_2d": [0, 0, 2000000, 10]}',
        '{"bbox_2d": [10, 0, 0, 10]}',
        '{"bbox_2d": [0, 10, 10, 10]}',
        '{"bbox_2d": [0, 0, 10]}',
        '{"bbox_2d": [0, 0, 10, 10, 1]}',
        '{"bbox_2d": [false, false, true, true]}',
        '{"bbox_2d": ["0", "0", "10", "10"]}',
        '{"bbox_2d": [[0], 0, 10, 10]}',
        '{"bbox_2d": {"x1": 0}}',
        '{"bbox_2d": null}',
        '{"bbox": [0, 0, 10, 10]}',
        "[0, 0, 10, 10]",
        "null",
        "7",
        '{"bbox_2d": [0, 0, ' + "1" * 10_000 + ", 10]}",
    ],
)
def test_an_unusable_entry_is_left_out_and_the_others_count(entry: str) -> None:
    good = '{"bbox_2d": [0, 0, 10, 10]}'
    assert read_boxes(raw_answer(f"[{entry}, {good}]"), max_entries=12) == [(0, 0, 10, 10)]
    assert read_boxes(raw_answer(f"[{entry}]"), max_entries=12) is None


def test_repairs_read_the_usual_slips_of_quoting() -> None:
    assert read_boxes(raw_answer("""[{'bbox_2d': '[0, 0, 10, 10]', "label": "person"}]"""), max_entries=12) == [(0, 0, 10, 10)]


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "<answer></answer>",
        "<answer>[]</answer>",
        raw_answer(""),
        raw_answer("{}"),
        raw_answer('{"bbox_2d": [0, 0, 10, 10]}'),
        raw_answer('[{"bbox_2d": [0, 0, 10, 10]}'),
        raw_answer("[" * 500_000),
        raw_answer('{"a":' * 200_000),
        raw_answer("[" * 100_000 + "]" * 100_000),
        raw_answer('["' + "\\" * 1_000_000),
        raw_answer("[" + "1" * 1_000_000),
        "```json[" * 100_000,
        "<answer>none</answer>" + raw_answer('[{"bbox_2d": [0, 0, 10, 10]}]'),
    ],
    ids=lambda text: text[:40].replace("\n", " "),
)
def test_an_unreadable_answer_earns_no_iou_and_says_so(completion: str) -> None:
    score = score_grounding(completion, SQUARE, PIXELS)
    assert (score.iou, score.parsed) == (0.0, False)


def test_an_empty_list_is_a_readable_answer_that_finds_nothing() -> None:
    score = score_grounding(raw_answer("[]"), SQUARE, PIXELS)
    assert (score.format, score.iou, score.parsed) == (0.75, 0.0, True)


def test_without_answer_tag_the_whole_text_is_read_and_format_pays() -> None:
    score = score_grounding('<think>r</think>```json\n[{"bbox_2d": [0, 0, 10, 10]}]\n```', SQUARE, PIXELS)
    assert (score.format, score.iou) == (0.25, 1.0)


def test_a_hundred_boxes_score_less_than_one_honest_box() -> None:
    tiles = [[x, y, x + 10, y + 10] for x in range(0, 100, 10) for y in range(0, 100, 10)]
    spam = score_grounding(answer(tiles), SQUARE, PIXELS)
    honest = score_grounding(answer([[3, 3, 13, 13]]), SQUARE, PIXELS)
    assert (spam.iou, spam.parsed) == (0.0, False)
    assert honest.iou == pytest.approx(49 / 151, abs=1e-12)


def test_the_limit_on_predictions_counts_unusable_entries_too() -> None:
    assert max_predictions(1) == 12
    assert read_boxes(answer([[0, 0, 10, 10]] * 12), max_entries=12) == [(0, 0, 10, 10)] * 12
    assert read_boxes(raw_answer(json.dumps([{"bbox_2d": [0, 0, 10, 10]}] + [0] * 12)), max_entries=12) is None


def test_two_hundred_objects_with_duplicates_are_assigned_one_to_one() -> None:
    objects = tuple((float(i), 0.0, i + 1.0, 1.0) for i in range(200))
    assert mean_assigned_iou([*objects, *objects], objects) == pytest.approx(1.0, abs=1e-12)


sides = st.floats(min_value=0.01, max_value=100)
boxes = st.builds(
    lambda x, y, width, height: (x, y, x + width, y + height), st.floats(-50, 100), st.floats(-50, 100), sides, sides
)


@given(st.lists(boxes, max_size=5), st.lists(boxes, min_size=1, max_size=5))
def test_the_iou_part_lies_between_zero_and_one_and_ignores_order(predicted: list[Box], objects: list[Box]) -> None:
    value = mean_assigned_iou(predicted, tuple(objects))
    assert 0 <= value <= 1 + 1e-9
    assert mean_assigned_iou(predicted[::-1], tuple(objects[::-1])) == pytest.approx(value, abs=1e-9)


@given(st.lists(boxes, min_size=1, max_size=5))
def test_only_the_objects_themselves_reach_one(objects: list[Box]) -> None:
    assert mean_assigned_iou(list(objects), tuple(objects)) == pytest.approx(1.0, abs=1e-9)


numbers = st.none() | st.booleans() | st.floats() | st.integers()
entries = st.dictionaries(st.sampled_from(["bbox_2d", "label"]), st.lists(numbers, max_size=5) | st.text(max_size=5), max_size=2)


@given(st.lists(entries | numbers, max_size=14) | entries | numbers)
def test_any_json_gives_a_finite_score(value: Any) -> None:
    score = score_grounding(raw_answer(json.dumps(value)), SQUARE, PIXELS)
    assert 0 <= score.iou <= 1 + 1e-9
    assert score.format in (0.5, 0.75)
