"""What attempts at gaming the rewards are made of."""

from __future__ import annotations

from dataclasses import dataclass

from mars_shared.contracts import BoxesTruth, BoxFrame, TextTruth


@dataclass(frozen=True)
class Attempt:
    """A completion that tries to earn more than it knows.

    Attributes:
        family: the kind of trick; the table counts by it.
        trick: what it tries.
        highest: the reward that it may get, computed by hand: format, and what it does know.
        frame: of a completion's boxes.
    """

    family: str
    trick: str
    truth: TextTruth | BoxesTruth
    completion: str
    highest: float
    frame: BoxFrame | None = None

    def __str__(self) -> str:
        return f"{self.family}: {self.trick}"


def thought_and(answer: str) -> str:
    """A completion of perfect format, if the answer holds what is asked for."""
    return f"<think>r</think><answer>{answer}</answer>"


def fenced(json_text: str) -> str:
    return f"```json\n{json_text}\n```"
