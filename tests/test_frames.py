"""A perfect prediction has IoU 1, up to rounding, in whichever coordinate frame the model writes boxes."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mars_reward.rewards.grounding import score_grounding
from mars_rollout.render import ImageGeometry
from mars_shared.contracts import BoxesTruth, BoxFrame, FrameKind

QWEN = ImageGeometry(
    SimpleNamespace(patch_size=14, merge_size=2, size={"shortest_edge": 56 * 56, "longest_edge": 1280 * 28 * 28})
)
"""Qwen2.5-VL's sizes: multiples of 28, between 3,136 and about a million pixels."""


def perfect_answer(truth: BoxesTruth, frame: BoxFrame) -> str:
    """The true boxes as a model of that frame writes them: whole numbers."""
    scale = (frame.width / truth.width_px, frame.height / truth.height_px) * 2
    boxes = [[round(value * factor) for value, factor in zip(box, scale, strict=True)] for box in truth.boxes]
    return f"<answer>```json\n{json.dumps([{'bbox_2d': box} for box in boxes])}\n```</answer>"


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(list(FrameKind)),
    size=st.tuples(st.integers(200, 4000), st.integers(200, 4000)),
    corner=st.tuples(st.floats(0, 0.5), st.floats(0, 0.5)),
    extent=st.tuples(st.floats(0.2, 0.5), st.floats(0.2, 0.5)),
)
def test_a_perfect_prediction_has_iou_1_up_to_rounding(
    kind: FrameKind, size: tuple[int, int], corner: tuple[float, float], extent: tuple[float, float]
) -> None:
    width, height = size
    assume(max(size) / min(size) < 20)
    x, y = corner[0] * width, corner[1] * height
    truth = BoxesTruth(boxes=((x, y, x + extent[0] * width, y + extent[1] * height),), width_px=width, height_px=height)
    frame = QWEN.frame(kind, size, what="image")
    # Each side moves by at most half a unit of the frame: what that can cost of sides of 0.2 and more of it.
    lost = sum(1 / (0.2 * side) for side in (frame.width, frame.height))
    assert score_grounding(perfect_answer(truth, frame), truth, frame).iou >= 1 - 2 * lost


def test_iou_in_the_wrong_frame_is_what_the_frame_saves_from() -> None:
    truth = BoxesTruth(boxes=((100, 100, 300, 300),), width_px=1280, height_px=1024)
    per_mille = BoxFrame(kind=FrameKind.PER_MILLE, width=1000, height=1000)
    original = BoxFrame(kind=FrameKind.ORIGINAL, width=1280, height=1024)
    answer = perfect_answer(truth, per_mille)
    assert score_grounding(answer, truth, per_mille).iou > 0.98
    # (78, 98, 234, 293) against (100, 100, 300, 300): 134 * 193 of 156 * 195 + 200 * 200 - 134 * 193.
    assert score_grounding(answer, truth, original).iou == pytest.approx(25862 / 44558, abs=1e-6)


@pytest.mark.parametrize(
    ("size", "resized"),
    # smart_resize: sides to multiples of 28, then the area into its bounds.
    [((1280, 1024), (1120, 896)), ((56, 56), (56, 56)), ((300, 200), (308, 196)), ((30, 30), (56, 56))],
)
def test_the_resized_frame_is_that_of_the_processor(size: tuple[int, int], resized: tuple[int, int]) -> None:
    frame = QWEN.frame(FrameKind.RESIZED, size, what="image")
    assert (frame.width, frame.height) == resized
