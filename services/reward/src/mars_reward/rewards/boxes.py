"""What all grounding rewards share: the list that a completion answers, and IoU of every pair of boxes."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mars_reward.rewards.format import answers_of, fenced_json_of

Box = tuple[float, float, float, float]

_REPAIRS = (("'bbox_2d'", '"bbox_2d"'), ("'[", "["), ("]'", "]"))
"""Slips of real models that leave the meaning clear."""


def answered_list(completion: str) -> list[object] | None:
    """The list in the first ```json block of the first answer, or of the whole text if no answer is tagged; else None."""
    answers = answers_of(completion)
    fenced = fenced_json_of(answers[0] if answers else completion)
    if not fenced:
        return None
    text = fenced[0]
    for wrong, right in _REPAIRS:
        text = text.replace(wrong, right)
    try:
        # Integers become floats, so that a million digits cost linear time and end as infinity.
        value = json.loads(text, parse_int=float)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, list) else None


def pairwise_iou(predicted: Sequence[Box], objects: Sequence[Box], dtype: DTypeLike) -> NDArray[np.floating]:
    """Intersection over union of every prediction with every object, [P, T], computed in `dtype`.

    0 where the union is not positive or not finite: predicted boxes may be inside out.
    """
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        boxes_P4, objects_T4 = np.array(predicted, dtype=dtype), np.array(objects, dtype=dtype)
        top_left = np.maximum(boxes_P4[:, None, :2], objects_T4[None, :, :2])
        bottom_right = np.minimum(boxes_P4[:, None, 2:], objects_T4[None, :, 2:])
        overlap_PT = np.maximum(bottom_right - top_left, 0).prod(axis=-1)
        area_P = (boxes_P4[:, 2:] - boxes_P4[:, :2]).prod(axis=-1)
        area_T = (objects_T4[:, 2:] - objects_T4[:, :2]).prod(axis=-1)
        union_PT = area_P[:, None] + area_T[None, :] - overlap_PT
        iou_PT = np.where(union_PT > 0, overlap_PT / union_PT, 0).astype(dtype)
    finite_PT: NDArray[np.floating] = np.nan_to_num(iou_PT, nan=0.0, posinf=0.0, neginf=0.0)
    return finite_PT
