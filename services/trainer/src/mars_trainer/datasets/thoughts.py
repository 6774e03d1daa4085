"""Answers that come with a chain of thought: <think>CHAIN</think><answer>ANSWER</answer>."""

from __future__ import annotations

import re
from typing import Any

from mars_shared.errors import InputError

_TAG = re.compile(r"</?(?:think|answer)>")
_FORM = re.compile(r"\s*(?:<think>(?P<thought>.*?)</think>)?\s*<answer>(?P<answer>.*?)</answer>\s*", re.DOTALL)


def first_tag(text: str) -> str | None:
    """The first of the tags that mark chains and answers in a completion, e.g. "</answer>"; None if the text has none."""
    found = _TAG.search(text)
    return found[0] if found else None


def split_thought(answer: Any, field: str, thought: str | None = None) -> tuple[str | None, Any]:
    """(chain of thought or None, answer); what is no text, or has no tags, is an answer as it stands; a blank chain counts as none.

    Args:
        field: file, row and field, for errors.
        thought: a chain that the row states apart from its answer.

    Raises:
        InputError: the tags have another form, or there are two chains.

    Example:
        split_thought("<think>A cup.</think><answer>B</answer>", "rows.json row 0: answer") == ("A cup.", "B")
    """
    stated = (thought or "").strip() or None
    if not isinstance(answer, str) or not _TAG.search(answer):
        return stated, answer
    found = _FORM.fullmatch(answer)
    parts = [] if found is None else [found["thought"] or "", found["answer"]]
    if found is None or any(_TAG.search(part) for part in parts) or not parts[1].strip():
        raise InputError(f"{field}: {answer[:80]!r} has tags; expected <think>CHAIN</think><answer>ANSWER</answer>")
    inside = parts[0].strip() or None
    if stated and inside:
        raise InputError(f"{field}: has a chain of thought, and so has think; expected one of them")
    return stated or inside, parts[1].strip()
