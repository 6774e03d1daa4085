"""The rewards of the paper's released code (AI9Stars/MARS), equal to it where it returns a value.

Recipe `released`. Known weaknesses are part of it: "a" is right for "Yes, a cat", and several
objects can earn more than 1. Where the released code raises, the accuracy is 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from mars_reward.rewards.boxes import Box, answered_list, pairwise_iou
from mars_reward.rewards.format import answers_of, score_format

MIN_IOU = 0.3
"""An IoU counts only above this."""
MAX_ENTRIES = 4096
"""More than any completion can list; the assignment takes memory in proportion to entries times objects."""


@dataclass(frozen=True)
class ReleasedGrounding:
    """`iou` is 0 or more, above 1 for several objects found; `parsed`: whether a list of objects could be read."""

    format: float
    iou: float
    parsed: bool


@dataclass(frozen=True)
class ReleasedVqa:
    """`accuracy` is 0 or 1; `parsed`: whether there is an answer tag."""

    format: float
    accuracy: float
    parsed: bool


def released_grounding(completion: str, objects: Sequence[Box], *, scale: tuple[float, float] = (1.0, 1.0)) -> ReleasedGrounding:
    """Format (at most 0.75) and IoU part of a completion.

    The optimal assignment's IoUs summed over the
    number of objects, times 1 + 0.3 ln(objects) if there are several, minus 0.5 for each
    surplus entry over the number of objects (at most 1), never below 0. IoU is float32.

    Args:
        objects: ground truth in pixels, at least one.
        scale: (x, y), what the completion's coordinates are multiplied by to be in those pixels.
    """
    entries = answered_list(completion)
    predicted = [box for entry in entries or () if (box := _box(entry, scale)) is not None]
    return ReleasedGrounding(
        format=score_format(completion, expect_json=True).total,
        iou=_iou_part(predicted, len(entries or ()), objects),
        parsed=entries is not None,
    )


def released_vqa(completion: str, truth: str) -> ReleasedVqa:
    """Format (at most 0.5) and accuracy: 1 if truth and first answer, lowered and stripped, contain one another."""
    answers = answers_of(completion)
    right = bool(answers) and _contain_each_other(answers[0].lower().strip(), truth.lower().strip())
    return ReleasedVqa(score_format(completion, expect_json=False).total, float(right), bool(answers))


def _contain_each_other(answer: str, truth: str) -> bool:
    return truth in answer or answer in truth


def _box(entry: object, scale: tuple[float, float]) -> Box | None:
    corners = entry.get("bbox_2d") if isinstance(entry, dict) else None
    if not isinstance(corners, list) or len(corners) != 4 or not all(isinstance(value, float) for value in corners):
        return None
    x1, y1, x2, y2 = corners
    return x1 * scale[0], y1 * scale[1], x2 * scale[0], y2 * scale[1]


def _iou_part(predicted: Sequence[Box], num_entries: int, objects: Sequence[Box]) -> float:
    if not predicted or num_entries > MAX_ENTRIES:
        return 0.0
    iou_PT = pairwise_iou(predicted, objects, np.float32)
    rows, columns = linear_sum_assignment(iou_PT, maximize=True)
    found = math.fsum(float(iou) for iou in iou_PT[rows, columns] if iou > MIN_IOU)
    bonus = 1 + 0.3 * math.log(len(objects))
    surplus = max(num_entries - len(objects), 0) / len(objects)
    return max(found / len(objects) * bonus - min(0.5 * surplus, 1.0), 0.0)
