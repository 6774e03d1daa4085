"""Our own files: one question a line, its sources by name.

    {"id": "7", "question": "Which digit?", "answer": "7",
     "sources": [{"name": "visible", "image": "7-visible.png"}, {"name": "infrared", "image": "7-infrared.png"}]}

`answer` is a text, or boxes [[x1, y1, x2, y2], ...] in pixels of the first image. A source may state the `blake3` of its bytes.
`think`, which may be absent, is a chain of thought that leads to the answer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from mars_shared.contracts.prompt import BlobHash, SourceName
from mars_shared.errors import InputError
from mars_trainer.datasets.answers import Answer, read_answer
from mars_trainer.datasets.marks import check_marks, count_marks, without_marks
from mars_trainer.datasets.records import NamedPath, Record, Row, shaped


class _Source(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: SourceName
    image: str = Field(min_length=1)
    blake3: BlobHash | None = None


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid")

    id: str = Field(min_length=1)
    question: str = Field(pattern=r"\S")
    answer: Answer
    think: str | None = Field(default=None, pattern=r"\S")
    sources: list[_Source] = Field(min_length=1, max_length=64)


def jsonl_record(row: Row, names: Sequence[str] | None) -> Record:
    """A line as a record.

    Args:
        names: must be None; the lines name their sources.

    Raises:
        InputError: the line is not of this form; names file, line and field.
    """
    found = shaped(_Line, row)
    own = [source.name for source in found.sources]
    if names is not None:
        raise InputError(f"{row.where}: source names were given, but the lines of this format name their sources themselves")
    if len(set(own)) != len(own):
        raise InputError(f"{row.where}: sources: names are {', '.join(own)}; expected each once")
    return Record(
        where=row.where,
        record_id=found.id,
        question=_question(found, row.where),
        images=tuple(NamedPath(source.name, Path(source.image), source.blake3) for source in found.sources),
        answer=read_answer(found.answer, f"{row.where}: answer"),
        thought=found.think,
    )


def _question(line: _Line, where: str) -> str:
    if marks := count_marks(line.question):
        check_marks(marks, len(line.sources), f"{where}: question")
        return without_marks(line.question)
    return line.question


def jsonl_line(record: Record) -> str:
    """A record as a line of our own format."""
    answer = record.answer if isinstance(record.answer, str) else [list(box) for box in record.answer]
    sources = [
        {"name": image.name, "image": str(image.path)} | ({} if image.blake3 is None else {"blake3": image.blake3})
        for image in record.images
    ]
    think = {} if record.thought is None else {"think": record.thought}
    line = {"id": record.record_id, "question": record.question, "answer": answer} | think | {"sources": sources}
    return json.dumps(line, ensure_ascii=False)
