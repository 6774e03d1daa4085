"""SpatialQA and SpatialBench, RGB with depth maps, as SpatialBot publishes and reads them (github.com/BAAI-DCAI/SpatialBot).

Training (read in bunny/util/data_utils.py): conversations whose marks are numbered.

    {"id": 7, "image": ["a.jpg", "a_d.png"], "conversations": [
        {"from": "human", "value": "<image 1>\\n<image 2>\\nWhich is closer?"}, {"from": "gpt", "value": "the cup"}]}

SpatialBench (read in bunny/eval/eval_spatialbench.py): questions about one RGB image, whose depth map has its stem and lies in
the folder of the same name with "_d" after it: existence/a.jpg and existence_d/a.png.

    {"image": "existence/a.jpg", "question": "Is there a person?", "answer": "Yes"}
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath

from pydantic import BaseModel, Field

from mars_shared.errors import InputError
from mars_trainer.datasets.answers import Answer
from mars_trainer.datasets.conversations import conversation_record
from mars_trainer.datasets.marks import without_marks
from mars_trainer.datasets.records import Record, Row, name_images, shaped

SOURCES = ("rgb", "depth")


class _Question(BaseModel):
    record_id: str | int | None = Field(default=None, alias="id")
    image: str | list[str] = Field(min_length=1)
    question: str
    answer: Answer


def spatialqa_record(row: Row, names: Sequence[str] | None) -> Record:
    """A row of either kind as a record; sources are rgb and depth unless others are named.

    Raises:
        InputError: the row is of neither form; names file, row and field.
    """
    if isinstance(row.value, dict) and "conversations" in row.value:
        return conversation_record(row, names or SOURCES)
    found = shaped(_Question, row)
    question = without_marks(found.question)
    if not question:
        raise InputError(f"{row.where}: question: no text")
    return Record(
        where=row.where,
        record_id=str(row.number if found.record_id is None else found.record_id),
        question=question,
        images=name_images(_with_depth(found.image, row.where), names or SOURCES, row.where),
        answer=found.answer,
    )


def _with_depth(image: str | list[str], where: str) -> list[str]:
    """An RGB image and its depth map; a list of several images names the map itself."""
    paths = [image] if isinstance(image, str) else image
    if len(paths) > 1:
        return paths
    rgb = PurePosixPath(paths[0])
    if not rgb.parent.name:
        raise InputError(f"{where}: image: {rgb} stands in no folder; expected FOLDER/{rgb}, with its depth map in FOLDER_d")
    return [str(rgb), str(rgb.parent.with_name(f"{rgb.parent.name}_d") / f"{rgb.name.split('.')[0]}.png")]
