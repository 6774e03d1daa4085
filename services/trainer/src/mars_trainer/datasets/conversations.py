"""Conversation files of the LLaVA kind, as in M4-Instruct (nuScenes with six views, OCR-VQA with two covers).

{"id": "7", "image": ["a.jpg", "b.jpg"], "conversations": [
    {"from": "human", "value": "<image><image>\\nWhich?"}, {"from": "gpt", "value": "B"}]}
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import AliasChoices, BaseModel, Field

from mars_shared.errors import InputError
from mars_trainer.datasets.answers import read_answer
from mars_trainer.datasets.marks import check_marks, count_marks, without_marks
from mars_trainer.datasets.records import Record, Row, name_images, shaped
from mars_trainer.datasets.thoughts import split_thought


class _Turn(BaseModel):
    speaker: str = Field(validation_alias="from")
    value: str


class _Conversation(BaseModel):
    record_id: str | int | None = Field(default=None, validation_alias=AliasChoices("id", "sample_id"))
    image: str | list[str] = Field(min_length=1)
    conversations: list[_Turn] = Field(min_length=2)


def conversation_record(row: Row, names: Sequence[str] | None) -> Record:
    """The first question of a conversation and its answer.

    Raises:
        InputError: the row is not of this form, or has not one mark (<image>, or <image 1>) for each image; names file, row and field.
    """
    found = shaped(_Conversation, row)
    paths = [found.image] if isinstance(found.image, str) else found.image
    asked, answered = found.conversations[:2]
    if asked.speaker != "human" or answered.speaker != "gpt":
        raise InputError(
            f"{row.where}: conversations: begins with {asked.speaker!r} and {answered.speaker!r}; expected human, then gpt"
        )
    check_marks(count_marks(asked.value), len(paths), f"{row.where}: conversations.0.value")
    question, answer = without_marks(asked.value), answered.value.strip()
    thought, answer = split_thought(answer, f"{row.where}: conversations.1.value")
    for field, text in (("conversations.0.value", question), ("conversations.1.value", answer)):
        if not text:
            raise InputError(f"{row.where}: {field}: no text")
    return Record(
        where=row.where,
        record_id=str(row.number if found.record_id is None else found.record_id),
        question=question,
        images=name_images(paths, names, row.where),
        answer=read_answer(answer, f"{row.where}: conversations.1.value"),
        thought=thought,
    )
