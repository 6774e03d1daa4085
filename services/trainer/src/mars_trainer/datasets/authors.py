"""The authors' evaluation files: chat content with image paths, and the truth beside it.

{"role": "user", "content": [{"type": "image", "image": "a.jpg"}, ..., {"type": "text", "text": "..."}],
 "ground_truth": "Yes" or [[x1, y1, x2, y2], ...], "extra_info": {"sample_id": ...}}

Texts and images stand in any order. <image> marks in a text are taken out, since the image parts say which images there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from mars_shared.errors import InputError
from mars_trainer.datasets.answers import Answer
from mars_trainer.datasets.marks import without_marks
from mars_trainer.datasets.records import Record, Row, name_images, shaped


class _Image(BaseModel):
    type: Literal["image"]
    image: str = Field(min_length=1)


class _Text(BaseModel):
    type: Literal["text"]
    text: str


class _Question(BaseModel):
    content: list[Annotated[_Image | _Text, Field(discriminator="type")]] = Field(min_length=1)
    ground_truth: Answer
    extra_info: Any = None


def authors_record(row: Row, names: Sequence[str] | None) -> Record:
    """A row as a record.

    Raises:
        InputError: the row is not of this form; names file, row and field.
    """
    found = shaped(_Question, row)
    paths = [part.image for part in found.content if isinstance(part, _Image)]
    texts = [without_marks(part.text) for part in found.content if isinstance(part, _Text)]
    question = "\n".join(filter(None, texts))
    if not paths:
        raise InputError(f"{row.where}: content: no image; expected at least one part of type image")
    if not question:
        raise InputError(f"{row.where}: content: no text; expected a part of type text with the question")
    return Record(
        where=row.where,
        record_id=_sample_id(found.extra_info) or str(row.number),
        question=question,
        images=name_images(paths, names, row.where),
        answer=found.ground_truth,
    )


def _sample_id(extra_info: Any) -> str:
    """The sample's name, empty if the row has none. Several questions of one file may share it."""
    value = extra_info.get("sample_id") if isinstance(extra_info, dict) else None
    return str(value).strip() if isinstance(value, str | int) else ""
