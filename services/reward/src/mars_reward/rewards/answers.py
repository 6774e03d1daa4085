"""When a text answer equals the truth: a normalised match that cannot be gamed by short answers.

Compared are whole answers in normal form, never substrings: "a" isn't "Yes, a cat", "7" isn't
"17", "not white" isn't "white". Everything takes time linear in the texts.
"""

from __future__ import annotations

import re
import unicodedata

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
_LABEL = re.compile(r"[(\[]?([a-z])[)\].:]+")
_DASHES = str.maketrans(dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d", "-") | {"\u2014": " "})
_SAYS_MORE_IN_FRONT = frozenset("<>≤≥≠≈~±¬")
_SAYS_MORE_BEHIND = frozenset("+#")
"""Symbols at the edge of a word that change what it says: "≥2" isn't "2", "C#" isn't "C"."""
_MARKUP = "*_`$"
_CHOICES = frozenset("abcd")
"""Letters that name a choice wherever they stand with a dot; later ones may be initials ("J. K. Rowling")."""


def matches(answer: str, truth: str) -> bool:
    """Whether an answer says what the truth says.

    The truth may offer alternatives ("two or 2"); all alternatives of the answer must be among
    them, so that hedging ("yes or no") is wrong. Case, punctuation at the edges of words,
    hyphens between letters, a leading article and lead-ins ("The answer is") don't count;
    number words up to ninety-nine equal their digits. A yes/no truth takes the answer's first
    word ("Yes, a cat") if the opposite stands nowhere in it; a choice letter takes the answer's
    label ("B. Tokyo", "(b)") if it names no other choice.

    Example:
        matches("The answer is 2.", "two or 2") and not matches("17", "7")
    """
    wanted, offered = _alternatives(truth), _alternatives(answer)
    accepted = {" ".join(_normal(words)) for words in wanted}
    if not accepted:
        return answer.casefold().split() == truth.casefold().split()
    if accepted <= _YES_NO:
        return _said_of_yes_no(offered) <= accepted and _all_in([_yes_or_no(words) for words in offered], accepted)
    if all(len(words) == 1 and _label(words) for words in wanted):
        return _all_in([_label(words) for words in offered], accepted)
    given = {" ".join(_normal(words)) for words in offered}
    return bool(given) and given <= accepted


def _all_in(commitments: list[str | None], accepted: set[str]) -> bool:
    """Whether the first alternative commits itself, and no other to anything else."""
    return bool(commitments) and commitments[0] is not None and set(commitments) - {None} <= accepted


def _alternatives(text: str) -> list[list[str]]:
    """The words of a text, lowered, without lead-in and lone symbols, split at each "or"; no part is empty."""
    dashed = re.sub(r"(?<=[^\W\d_])-(?=[^\W\d_])", " ", text.casefold().translate(_DASHES))
    words = re.sub(r"(?<!\S)-\s+(?=\d)", "-", dashed).split()
    parts: list[list[str]] = [[]]
    for word in _without_lead_in(_without_lead_in([word for word in words if _core(word)] or words)):
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
    """A word without the symbols at its edges that say nothing; a minus before a digit or behind a letter ("A-") stays."""
    start, end = 0, len(word)
    while start < end and not (_spells(word[start]) or word[start] in _SAYS_MORE_IN_FRONT):
        start += 1
    while end > start and not (_spells(word[end - 1]) or word[end - 1] in _SAYS_MORE_BEHIND):
        end -= 1
    is_negative = start > 0 and start < end and word[start - 1] == "-" and word[start].isdigit()
    is_grade = end - start == 1 and word[start].isalpha() and word[end : end + 1] == "-"
    return word[start - is_negative : end + is_grade]


def _spells(char: str) -> bool:
    """Whether a character is a letter, a digit, or a mark on one, such as a vowel sign or an accent."""
    return char.isalnum() or unicodedata.category(char).startswith("M")


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


def _said_of_yes_no(offered: list[list[str]]) -> set[str]:
    """Which of yes and no stand anywhere in an answer."""
    return {said for words in offered for word in words for said in re.findall(r"[^\W_]+", word)} & _YES_NO


def _label(words: list[str]) -> str | None:
    """The choice letter of "B", "(B)", "B.", "B) Tokyo"; None of "a cat" and of "A. Tokyo B. Paris"."""
    first, *rest = words
    if label := _labelled(first):
        return None if _names_other_choice(rest, label) else label
    return _letter(first) if not rest else None


def _names_other_choice(words: list[str], label: str) -> bool:
    """Whether what follows a label is a list of letters, or labels another choice; "B. Plan C." doesn't."""
    letters = [_letter(word) for word in words if _core(word) != "and"]
    if letters and None not in letters and set(letters) != {label}:
        return True
    inner = [*words[:-1], *(word.rstrip(".") for word in words[-1:])]
    return any(other != label and (other in _CHOICES or ")" in word) for word in inner if (other := _labelled(word)))


def _labelled(word: str) -> str | None:
    found = _LABEL.fullmatch(word.strip(_MARKUP))
    return found.group(1) if found else None


def _letter(word: str) -> str | None:
    core = _core(word)
    return core if len(core) == 1 and core.isalpha() else None
