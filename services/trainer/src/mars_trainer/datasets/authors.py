"""The authors' evaluation files: chat content with image paths, and the truth beside it.

{"role": "user", "content": [{"type": "image", "image": "a.jpg"}, ..., {"type": "text", "text": "..."}],
 "ground_truth": "Yes" or [[x1, y1, x2, y2], ...], "extra_info": {"sample_id": ...}}
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from mars_shared.errors import InputError
from mars_trainer.datasets.records import Box, Record, Row, name_images, shaped


class _Image(BaseModel):
    type: Literal["image"]
    image: str = Field(min_length=1)


class _Text(BaseModel):
    type: Literal["text"]
    text: str


class _Question(BaseModel):
    content: list[Annotated[_Image | _Text, Field(discriminator="type")]] = Field(min_length=1)
    ground_truth: Annotated[str, Field(min_length=1)] | Annotated[list[Box], Field(min_length=1)]
    extra_info: dict[str, Any] = {}


def authors_record(row: Row, names: Sequence[str] | None) -> Record:
    """A row as a record.

    Raises:
        InputError: the row is not of this form; names file, row and field.
    """
    found = shaped(_Question, row)
    paths = [part.image for part in found.content if isinstance(part, _Image)]
    question = "\n".join(part.text.strip() for part in found.content if isinstance(part, _Text)).strip()
    if not paths:
        raise InputError(f"{row.where}: content: no image; expected at least one part of type image")
    if not question:
        raise InputError(f"{row.where}: content: no text; expected a part of type text with the question")
    return Record(
        where=row.where,
        record_id=str(found.extra_info.get("sample_id", row.number)),
        question=question,
        images=name_images(paths, names, row.where),
        answer=found.ground_truth if isinstance(found.ground_truth, str) else tuple(found.ground_truth),
    )
