"""Whether a completion keeps the format: one thought, one answer, one fenced json block.

Everything here takes time linear in the completion, whatever it holds.
"""

from __future__ import annotations

from dataclasses import dataclass

PART = 0.25


@dataclass(frozen=True)
class FormatScore:
    """What each rule gave, 0 or 0.25; `fenced_json` stays 0 where it isn't asked for."""

    think: float
    answer: float
    fenced_json: float

    @property
    def total(self) -> float:
        return self.think + self.answer + self.fenced_json


def score_format(completion: str, *, expect_json: bool) -> FormatScore:
    """Format reward of a completion, at most 0.5, or 0.75 with `expect_json`.

    0.25 each: exactly one non-empty <think>..</think>; exactly one non-empty
    <answer>..</answer>; with `expect_json`, exactly one ```json block in a single answer.
    The block's content isn't judged here.

    Example:
        score_format("<think>r</think><answer>B</answer>", expect_json=False).total == 0.5
    """
    thoughts = blocks(completion, "<think>", "</think>")
    answers = answers_of(completion)
    fenced = [] if len(answers) != 1 else fenced_json_of(answers[0])
    return FormatScore(
        think=PART * _is_one_with_text(thoughts),
        answer=PART * _is_one_with_text(answers),
        fenced_json=PART * (expect_json and len(fenced) == 1),
    )


def answers_of(completion: str) -> list[str]:
    """The contents of all <answer>..</answer>, in order."""
    return blocks(completion, "<answer>", "</answer>")


def fenced_json_of(text: str) -> list[str]:
    """The contents of all ```json blocks, in order."""
    return blocks(text, "```json", "```")


def blocks(text: str, opening: str, closing: str) -> list[str]:
    """What stands between each opening tag and the first closing tag after it.

    Tags don't nest: the search goes on behind each closing tag, and an opening tag that is
    never closed begins no block.
    """
    found: list[str] = []
    end = 0
    while (start := text.find(opening, end)) >= 0:
        start += len(opening)
        stop = text.find(closing, start)
        if stop < 0:
            break
        found.append(text[start:stop])
        end = stop + len(closing)
    return found


def _is_one_with_text(found: list[str]) -> bool:
    return len(found) == 1 and bool(found[0].strip())
