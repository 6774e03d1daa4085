"""When a text answer equals the truth: a normalised match that cannot be gamed by short answers.

Compared are whole answers in normal form, never substrings: "a" isn't "Yes, a cat", "7" isn't
"17", "not white" isn't "white". Everything takes time linear in the texts.
"""

from __future__ import annotations

import re

_ONES_TO_NINETEEN = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
)
_TENS_TO_NINETY = "twenty thirty forty fifty sixty seventy eighty ninety"
_ONES = {word: value for value, word in enumerate(_ONES_TO_NINETEEN.split())}
_TENS = {word: 10 * value for value, word in enumerate(_TENS_TO_NINETY.split(), start=2)}
_ARTICLES = frozenset({"a", "an", "the"})
_YES_NO = frozenset({"yes", "no"})
_LEAD_INS = tuple(
    tuple(phrase.split())
    for phrase in (
        "the final answer is",
        "the correct answer is",
        "the answer is",
        "answer is",
        "final answer",
        "answer",
        "option",
        "choice",
        "it is",
        "it's",
    )
)
_NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")
_LABEL = re.compile(r"\(?([a-z])[).:]+")


def matches(answer: str, truth: str) -> bool:
    """Whether an answer says what the truth says.

    The truth may offer alternatives ("two or 2"); all alternatives of the answer must be among
    them, so that hedging ("yes or no") is wrong. Case, punctuation at the edges of words,
    hyphens between letters, a leading article and lead-ins ("The answer is") don't count;
    number words up to ninety-nine equal their digits. A yes/no truth takes the answer's first
    word ("Yes, a cat"), a choice letter takes the answer's label ("B. Tokyo", "(b)").

    Example:
        matches("The answer is 2.", "two or 2") and not matches("17", "7")
    """
    wanted, offered = _alternatives(truth), _alternatives(answer)
    accepted = {" ".join(_normal(words)) for words in wanted}
    if not accepted:
        return answer.casefold().split() == truth.casefold().split()
    if accepted <= _YES_NO:
        return _all_in([_yes_or_no(words) for words in offered], accepted)
    if all(len(words) == 1 and _label(words) for words in wanted):
        return _all_in([_label(words) for words in offered], accepted)
    given = {" ".join(_normal(words)) for words in offered}
    return bool(given) and given <= accepted


def _all_in(commitments: list[str | None], accepted: set[str]) -> bool:
    """Whether the first alternative commits itself, and no other to anything else."""
    return bool(commitments) and commitments[0] is not None and set(commitments) - {None} <= accepted


def _alternatives(text: str) -> list[list[str]]:
    """The words of a text, lowered, without lead-in and lone symbols, split at each "or"; no part is empty."""
    words = re.sub(r"(?<=[^\W\d_])-(?=[^\W\d_])", " ", text.casefold()).split()
    parts: list[list[str]] = [[]]
    for word in _without_lead_in([word for word in words if _core(word)] or words):
        if word == "or":
            parts.append([])
        else:
            parts[-1].append(word)
    return [part for part in parts if part]


def _without_lead_in(words: list[str]) -> list[str]:
    for phrase in _LEAD_INS:
        if len(words) > len(phrase) and tuple(_core(word) for word in words[: len(phrase)]) == phrase:
            return words[len(phrase) :]
    return words


def _core(word: str) -> str:
    """A word without the symbols at its edges; a minus before a digit stays."""
    start, end = 0, len(word)
    while start < end and not word[start].isalnum():
        start += 1
    while end > start and not word[end - 1].isalnum():
        end -= 1
    is_negative = start > 0 and start < end and word[start - 1] == "-" and word[start].isdigit()
    return word[start - 1 : end] if is_negative else word[start:end]


def _normal(words: list[str]) -> list[str]:
    """Cores of the words, numbers as digits, without leading article; a text of symbols alone stays as it is."""
    cores = [_core(word) or word for word in words]
    if len(cores) > 1 and cores[0] in _ARTICLES:
        cores = cores[1:]
    normal: list[str] = []
    tens = 0
    for core in cores:
        if tens and 1 <= _ONES.get(core, 0) <= 9:
            normal[-1] = str(tens + _ONES[core])
            tens = 0
            continue
        tens = _TENS.get(core, 0)
        normal.append(str(tens or _ONES[core]) if tens or core in _ONES else _plain_number(core))
    return normal


def _plain_number(core: str) -> str:
    """1,000 and 2.0 as 1000 and 2; anything else as it is."""
    if not _NUMBER.fullmatch(core):
        return core
    digits = core.replace(",", "")
    return digits.rstrip("0").rstrip(".") if "." in digits else digits


def _yes_or_no(words: list[str]) -> str | None:
    first = _normal(words[:2])[0]
    return first if first in _YES_NO else None


def _label(words: list[str]) -> str | None:
    """The choice letter of "B", "(B)", "B.", "B) Tokyo"; None of "a cat"."""
    label = _LABEL.fullmatch(words[0])
    if label:
        return label.group(1)
    alone = _core(words[0])
    return alone if len(words) == 1 and len(alone) == 1 and alone.isalpha() else None
