"""Tables with TRL's columns: prompt, images (or image), answer; id, sources and think if there are any.

prompt: a text, or a conversation [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which?"}]}].
images: a list of {"bytes", "path"} (the feature Image of the library datasets) or of paths; image: a single one.
answer: a text, boxes [[x1, y1, x2, y2], ...] in pixels of the first image, or such boxes as JSON text;
or <think>CHAIN</think><answer>ANSWER</answer>. think: a chain of thought that leads to the answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from mars_shared.contracts.prompt import SourceName
from mars_shared.errors import InputError
from mars_trainer.datasets.answers import read_answer
from mars_trainer.datasets.questions import Message, question_of
from mars_trainer.datasets.records import Record, Row, shaped
from mars_trainer.datasets.tables import row_images, table_rows
from mars_trainer.datasets.thoughts import split_thought

NEEDED = ("prompt", "answer")


class _Columns(BaseModel):
    id: str | int | None = None
    prompt: str | list[Message]
    answer: Any
    sources: list[SourceName] | None = None
    think: str | None = None


def trl_rows(path: Path, split: str | None) -> Iterator[Row]:
    """Rows of a Parquet file or a saved dataset; raises InputError as `table_rows` does."""
    return table_rows(path, split, needed=NEEDED)


def trl_record(row: Row, names: Sequence[str] | None) -> Record:
    """A row as a record.

    Args:
        names: source names in image order, for rows that have none in a column `sources`.

    Raises:
        InputError: the row is not of this form; names file, row and field.
    """
    found = shaped(_Columns, row)
    if names is not None and found.sources is not None:
        raise InputError(f"{row.where}: source names were given, but the column sources names them; leave them out")
    images = row_images(row, found.sources or names)
    if found.sources is not None and len(found.sources) != len(images):
        raise InputError(f"{row.where}: sources: {len(found.sources)} names for {len(images)} images; expected one each")
    thought, answer = split_thought(found.answer, f"{row.where}: answer", found.think)
    return Record(
        where=row.where,
        record_id=str(row.number if found.id is None else found.id),
        question=question_of(found.prompt, len(images), row.where),
        images=images,
        answer=read_answer(answer, f"{row.where}: answer"),
        thought=thought,
    )
