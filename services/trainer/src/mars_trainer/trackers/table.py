"""Groups as a table of answers, one row each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from mars_shared.contracts import TextTruth
from mars_shared.records.groups import AnswerRecord, GroupRecord
from mars_trainer.readable import readable

MAX_CHARACTERS = 1000
"""Of an answer, and of everything else in a cell."""
_HARMLESS = frozenset(" .,:;?/=")
"""Besides letters and digits, what means nothing to Markdown within a cell."""


class Row(NamedTuple):
    """One answer. `seen` is the source that it was given from, or "all sources"."""

    prompt: str
    question: str
    truth: str
    seen: str
    answer: str
    reward: float
    parsed: bool
    gain: float | None


def rows_of(groups: Iterable[GroupRecord]) -> list[Row]:
    """All answers of the groups, in their order; texts are cut, and say so."""
    return [_row(group, answer) for group in groups for answer in group.answers]


def _row(group: GroupRecord, answer: AnswerRecord) -> Row:
    return Row(
        prompt=_cell(group.prompt_id),
        question=_cell(group.question),
        truth=_cell(_truth(group)),
        seen="all sources" if answer.source is None else _cell(answer.source),
        answer=_cell(answer.text),
        reward=answer.reward,
        parsed=answer.parsed,
        gain=group.gain,
    )


def _truth(group: GroupRecord) -> str:
    if group.truth is None:
        return ""
    return group.truth.text if isinstance(group.truth, TextTruth) else str([list(box) for box in group.truth.boxes])


def _cell(text: str) -> str:
    return readable(text, MAX_CHARACTERS)


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a table in Markdown that shows every text as it stands, whatever it contains."""
    lines = [" | ".join(Row._fields), " | ".join("---" for _ in Row._fields)]
    lines += [" | ".join(_literal(_shown(value)) for value in row) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return "" if value is None else str(value)


def _literal(text: str) -> str:
    """As Markdown that means the text itself: what could be markup stands as its number, ends of lines as breaks."""
    plain = (character if character.isalnum() or character in _HARMLESS else f"&#{ord(character)};" for character in text)
    return "".join(plain).replace("&#10;", "<br>")
