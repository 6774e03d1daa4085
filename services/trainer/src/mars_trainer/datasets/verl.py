"""Tables with verl's columns, usually in Parquet: data_source, prompt, images, reward_model, extra_info.

prompt: [{"role": "user", "content": "<image><image>Which?"}]. images: a list of {"bytes", "path"}, of {"image": path} or of
paths. reward_model: {"style": ..., "ground_truth": G} with G a text, boxes [[x1, y1, x2, y2], ...], boxes as JSON text, or
<think>CHAIN</think><answer>ANSWER</answer> around one of them.
extra_info: anything; "split" and "index" (or "sample_id") of it go into the id.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from mars_trainer.datasets.answers import read_answer
from mars_trainer.datasets.questions import Message, question_of
from mars_trainer.datasets.records import Record, Row, shaped
from mars_trainer.datasets.tables import row_images, table_rows
from mars_trainer.datasets.thoughts import split_thought

NEEDED = ("prompt", "reward_model")


class _RewardModel(BaseModel):
    ground_truth: Any


class _Columns(BaseModel):
    data_source: str | None = None
    prompt: str | list[Message]
    reward_model: _RewardModel
    extra_info: Any = None


def verl_rows(path: Path, split: str | None) -> Iterator[Row]:
    """Rows of a Parquet file or a saved dataset; raises InputError as `table_rows` does."""
    return table_rows(path, split, needed=NEEDED)


def verl_record(row: Row, names: Sequence[str] | None) -> Record:
    """A row as a record.

    Raises:
        InputError: the row is not of this form; names file, row and field.
    """
    found = shaped(_Columns, row)
    images = row_images(row, names)
    field = f"{row.where}: reward_model.ground_truth"
    thought, answer = split_thought(found.reward_model.ground_truth, field)
    return Record(
        where=row.where,
        record_id=_record_id(found, row.number),
        question=question_of(found.prompt, len(images), row.where),
        images=images,
        answer=read_answer(answer, field),
        thought=thought,
    )


def _record_id(found: _Columns, number: int) -> str:
    """Data source, split and index, as far as the row has them; e.g. "llvip/train/17"."""
    extra = found.extra_info if isinstance(found.extra_info, dict) else {}
    index = next((extra[key] for key in ("index", "sample_id") if extra.get(key) is not None), number)
    return "/".join(str(part) for part in (found.data_source, extra.get("split"), index) if part is not None)
