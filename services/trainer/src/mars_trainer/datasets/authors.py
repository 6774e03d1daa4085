"""The authors' evaluation files: chat content with image paths, and the truth beside it.

{"role": "user", "content": [{"type": "image", "image": "a.jpg"}, ..., {"type": "text", "text": "..."}],
 "ground_truth": "Yes" or [[x1, y1, x2, y2], ...], "extra_info": {"sample_id": ...}}
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from mars_shared.errors import InputError
from mars_trainer.datasets.records import Box, NamedPath, Record, json_rows, parsed, source_names


class _Image(BaseModel):
    type: Literal["image"]
    image: str = Field(min_length=1)


class _Text(BaseModel):
    type: Literal["text"]
    text: str


class _Row(BaseModel):
    content: list[Annotated[_Image | _Text, Field(discriminator="type")]] = Field(min_length=1)
    ground_truth: Annotated[str, Field(min_length=1)] | Annotated[list[Box], Field(min_length=1)]
    extra_info: dict[str, Any] = {}


def read_authors(path: Path, names: Sequence[str] | None = None) -> Iterator[Record]:
    """The file's questions in order; images are named, not opened.

    Args:
        names: source names in image order, e.g. ("visible", "infrared"); None: image-1, image-2, ...

    Raises:
        InputError: the file, or a row of it, is not of this form; names file, row and field.
    """
    for index, (where, value) in enumerate(json_rows(path)):
        row = parsed(_Row, value, where)
        paths = [part.image for part in row.content if isinstance(part, _Image)]
        question = "\n".join(part.text.strip() for part in row.content if isinstance(part, _Text)).strip()
        if not paths:
            raise InputError(f"{where}: content: no image; expected at least one part of type image")
        if not question:
            raise InputError(f"{where}: content: no text; expected a part of type text with the question")
        yield Record(
            where=where,
            record_id=str(row.extra_info.get("sample_id", f"{path.stem}/{index}")),
            question=question,
            images=tuple(NamedPath(name, Path(p)) for name, p in zip(source_names(len(paths), names, where), paths, strict=True)),
            answer=row.ground_truth if isinstance(row.ground_truth, str) else tuple(row.ground_truth),
        )
