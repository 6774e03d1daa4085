"""The arithmetic of the paper's released evaluation script, spelled out in its quirks.

It drops samples that it cannot parse from numerator and denominator, which inflates the mean;
use it to compare with published numbers, and `mean_assigned_iou` for everything else.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from mars_reward.rewards.boxes import Box, pairwise_iou
from mars_reward.rewards.format import answers_of, fenced_json_of
from mars_shared.contracts import BoxesTruth, ReleasedEval, Truth

_INT, _DECIMAL = r"(\d+)", r"(\d+\.\d+)"
_PATTERNS = tuple(
    re.compile(pattern)
    for pattern in (
        rf"\({_INT},\s*{_INT}\),\s*\({_INT},\s*{_INT}\)",
        rf"\[{_DECIMAL},\s*{_DECIMAL},\s*{_DECIMAL},\s*{_DECIMAL}\]",
        rf"\({_DECIMAL},{_DECIMAL}\),\({_DECIMAL},{_DECIMAL}\)",
        rf"\({_DECIMAL},\s*{_DECIMAL},\s*{_DECIMAL},\s*{_DECIMAL}\)",
        rf"\[{_INT},\s*{_INT},\s*{_INT},\s*{_INT}\]",
        rf"<box>{_INT}\s+{_INT}\s+{_INT}\s+{_INT}</box>",
    )
)
"""Ways to write a box; the first that matches anything is the one that counts."""


CORRECT_MIOU = 0.5
"""A sample is right above this (strictly)."""


def released_eval(completion: str, truth: Truth) -> ReleasedEval:
    """What the script says of a completion. Boxes are compared as they are written: the script converts no frames."""
    if isinstance(truth, BoxesTruth):
        miou = released_miou(completion, truth.boxes)
        return ReleasedEval(value=miou, correct=miou is not None and miou > CORRECT_MIOU)
    correct = released_correct(completion, truth.text)
    return ReleasedEval(value=float(correct), correct=correct)


def released_miou(completion: str, objects: Sequence[Box]) -> float | None:
    """A sample's mIoU; None where the script drops it: no answer tag, or no json block in the first one.

    Assigned IoU (float64) summed over the number of objects; 1 if there are neither boxes nor
    objects, 0 if there is only one of both.
    """
    answers = answers_of(completion)
    fenced = fenced_json_of(answers[0]) if answers else []
    if not fenced:
        return None
    predicted = written_boxes(fenced[0])
    if not predicted or not objects:
        return float(not predicted and not objects)
    iou_PT = pairwise_iou(predicted, objects, np.float64)
    rows, columns = linear_sum_assignment(iou_PT, maximize=True)
    return float(iou_PT[rows, columns].sum()) / len(objects)


def written_boxes(text: str) -> list[Box]:
    """All boxes of a text in the first of the known ways that occurs in it."""
    for pattern in _PATTERNS:
        if found := pattern.findall(text):
            return [(float(a), float(b), float(c), float(d)) for a, b, c, d in found]
    return []


def released_correct(completion: str, truth: str) -> bool:
    """Whether the script calls an answer right: one stands in the other.

    The truth must stand in the whole completion as whole words, or the completion anywhere in
    the truth, both in the script's normal form.
    """
    said, wanted = _normal(completion), _normal(truth)
    return re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", said) is not None or said in wanted


def _normal(text: str) -> str:
    words = (_bare(word.replace("-", " ")) for word in text.lower().strip().replace("-", " ").split())
    return " ".join(" ".join(words).split())


def _bare(word: str) -> str:
    """A word without symbols at its edges."""
    return re.sub(r"^[^\w]+|[^\w]+$", "", word)
