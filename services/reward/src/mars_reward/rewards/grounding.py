"""Grounding: how well predicted boxes cover the objects.

The total is format (at most 0.75) + IoU part (at most 1). The IoU part is the mean, over the
ground-truth objects, of the IoU of the prediction that the optimal assignment gives each
(0 for an object that gets none): no threshold, no bonus (recipe `paper`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from mars_reward.rewards.boxes import Box, answered_list, pairwise_iou
from mars_reward.rewards.format import score_format
from mars_shared.contracts import BoxesTruth, BoxFrame
from mars_shared.errors import InputError

MAX_OBJECTS = 512
"""Ground-truth objects of one item; the assignment is cubic in them."""

NO_FRAME = "frame is missing; expected the box frame of the completion's view, to convert its boxes to pixels"

MAX_COORDINATE_PX = 1e6
"""A coordinate beyond this isn't one; it keeps every area finite."""


@dataclass(frozen=True)
class GroundingScore:
    """`iou` is the mean assigned IoU in 0..1; `parsed` says whether boxes could be read."""

    format: float
    iou: float
    parsed: bool


def score_grounding(completion: str, truth: BoxesTruth, frame: BoxFrame | None) -> GroundingScore:
    """Score a completion against boxes; the completion's boxes are in `frame`.

    Raises:
        InputError: no frame, more ground-truth objects than MAX_OBJECTS, or one out of bounds.
    """
    if frame is None:
        raise InputError(NO_FRAME)
    check_objects(truth)
    predicted = answered_boxes(completion, truth, frame)
    return GroundingScore(
        format=score_format(completion, expect_json=True).total,
        iou=mean_assigned_iou(predicted or [], truth.boxes),
        parsed=predicted is not None,
    )


def answered_boxes(completion: str, truth: BoxesTruth, frame: BoxFrame) -> list[Box] | None:
    """The boxes that a completion answers, in the truth's pixels; None if unreadable."""
    predicted = read_boxes(completion, max_entries=max_predictions(len(truth.boxes)))
    if predicted is None:
        return None
    scale_x, scale_y = truth.width_px / frame.width, truth.height_px / frame.height
    scaled = ((x1 * scale_x, y1 * scale_y, x2 * scale_x, y2 * scale_y) for x1, y1, x2, y2 in predicted)
    return [box for box in scaled if _is_box(box)]


def max_predictions(num_objects: int) -> int:
    """How many entries an answer may list before it counts as unreadable.

    The assigned IoU takes the best predictions and forgives the rest, so that without a limit
    an answer tiling the image with boxes would score like one that knows. Honest answers
    stay far below.
    """
    return 4 * num_objects + 8


def read_boxes(completion: str, *, max_entries: int) -> list[Box] | None:
    """The boxes that a completion answers, in its own frame; None if unreadable.

    Read from the first ```json block of the first answer (of the whole text if no answer is
    tagged), which must be a list. Each usable entry is an object with `bbox_2d`, four finite
    numbers x1 < x2, y1 < y2; other entries are left out. Unreadable: no block, no JSON, JSON
    nested too deep, no list, more than `max_entries` entries, entries of which none is usable.
    An empty list is read as "no object".
    """
    entries = answered_list(completion)
    if entries is None or len(entries) > max_entries:
        return None
    boxes = [box for entry in entries if (box := _as_box(entry)) is not None]
    return boxes if boxes or not entries else None


def mean_assigned_iou(predicted: list[Box], objects: tuple[Box, ...]) -> float:
    """Assigned IoU summed over the number of objects, in 0..1; boxes are in the same pixels.

    Example:
        mean_assigned_iou([(0, 0, 10, 10)], ((0, 0, 10, 5), (50, 50, 60, 60))) == 0.25
    """
    if not predicted:
        return 0.0
    iou_PT = pairwise_iou(predicted, objects, np.float64)
    rows, columns = linear_sum_assignment(iou_PT, maximize=True)
    return float(iou_PT[rows, columns].sum()) / len(objects)


def check_objects(truth: BoxesTruth) -> None:
    """Raises InputError: more ground-truth objects than MAX_OBJECTS, or one out of bounds."""
    if len(truth.boxes) > MAX_OBJECTS:
        raise InputError(f"truth has {len(truth.boxes)} boxes; expected at most {MAX_OBJECTS}")
    for index, box in enumerate(truth.boxes):
        x1, y1, x2, y2 = box
        if not _is_box(box) or (x2 - x1) * (y2 - y1) <= 0:
            raise InputError(f"truth box {index} is {box}; expected an area and coordinates up to {MAX_COORDINATE_PX:.0f} px")


def _as_box(entry: object) -> Box | None:
    corners = entry.get("bbox_2d") if isinstance(entry, dict) else None
    if not isinstance(corners, list) or len(corners) != 4 or not all(isinstance(value, float) for value in corners):
        return None
    x1, y1, x2, y2 = corners
    box = (x1, y1, x2, y2)
    return box if _is_box(box) else None


def _is_box(box: Box) -> bool:
    x1, y1, x2, y2 = box
    return all(math.isfinite(value) and abs(value) <= MAX_COORDINATE_PX for value in box) and x1 < x2 and y1 < y2
