"""Visual question answering: format (at most 0.5) + accuracy (0 or 1)."""

from __future__ import annotations

from dataclasses import dataclass

from mars_reward.rewards.answers import matches
from mars_reward.rewards.format import answers_of, score_format
from mars_shared.contracts import TextTruth


@dataclass(frozen=True)
class VqaScore:
    """`accuracy` is 0 or 1; `parsed` says whether there was a non-empty answer."""

    format: float
    accuracy: float
    parsed: bool


def score_vqa(completion: str, truth: TextTruth) -> VqaScore:
    """Score a completion against a text; its first <answer>..</answer> counts, nothing outside does.

    Example:
        score_vqa("<think>r</think><answer>Two.</answer>", TextTruth(text="two or 2")) ==
        VqaScore(format=0.5, accuracy=1.0, parsed=True)
    """
    answers = answers_of(completion)
    answer = answers[0].strip() if answers else ""
    return VqaScore(
        format=score_format(completion, expect_json=False).total,
        accuracy=float(bool(answer) and matches(answer, truth.text)),
        parsed=bool(answer),
    )
