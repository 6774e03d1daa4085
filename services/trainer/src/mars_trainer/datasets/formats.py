"""The dataset formats we read: how a file or folder becomes rows, and a row a record."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mars_shared.errors import InputError
from mars_trainer.datasets.authors import authors_record
from mars_trainer.datasets.conversations import conversation_record
from mars_trainer.datasets.jsonl import jsonl_record
from mars_trainer.datasets.llvip import llvip_record, llvip_rows
from mars_trainer.datasets.records import Record, Row, json_rows, jsonl_rows
from mars_trainer.datasets.spatialqa import spatialqa_record
from mars_trainer.datasets.tables import is_saved_dataset, open_table, table_columns
from mars_trainer.datasets.trl import trl_record, trl_rows
from mars_trainer.datasets.verl import verl_record, verl_rows


@dataclass(frozen=True)
class Format:
    """`rows` raises InputError for the whole, `record` for one row, so that one wrong row spoils no other."""

    rows: Callable[[Path, str | None], Iterator[Row]]
    """Rows of a file or folder: those of a split, or all if that is None."""
    record: Callable[[Row, Sequence[str] | None], Record]
    """A row as a record, with the given source names."""
    ids_repeat: bool = False
    """Whether ids may name something else than the question, a scene for example, and so occur more than once."""


def _whole(rows: Callable[[Path], Iterator[Row]]) -> Callable[[Path, str | None], Iterator[Row]]:
    """Rows of a format that has no splits."""

    def read(path: Path, split: str | None) -> Iterator[Row]:
        if split is not None:
            raise InputError(f"{path}: split {split!r} was asked for, but files of this format have no splits; leave it out")
        return rows(path)

    return read


DATA_SUFFIXES = (".jsonl", ".json", ".parquet")

FORMATS: Mapping[str, Format] = {
    "authors": Format(_whole(json_rows), authors_record, ids_repeat=True),
    "conversations": Format(_whole(json_rows), conversation_record, ids_repeat=True),
    "huggingface": Format(trl_rows, trl_record),
    "jsonl": Format(_whole(jsonl_rows), jsonl_record),
    "llvip": Format(llvip_rows, llvip_record),
    "spatialqa": Format(_whole(json_rows), spatialqa_record, ids_repeat=True),
    "verl": Format(verl_rows, verl_record, ids_repeat=True),
}


def data_path(path: Path) -> Path:
    """The file to read: that itself, or the only data file of a folder that is no dataset as a whole.

    Raises:
        InputError: a folder with none or several.
    """
    if not path.is_dir() or (path / "Annotations").is_dir() or is_saved_dataset(path):
        return path
    files = sorted(file for file in path.iterdir() if file.suffix in DATA_SUFFIXES)
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise InputError(
            f"{path}: expected one {', '.join(DATA_SUFFIXES)} file in the folder, found {found}; name the file to read"
        )
    return files[0]


def format_of(path: Path) -> str:
    """The name of the format that a file or folder looks like.

    Raises:
        InputError: it looks like none of them, or cannot be read.
    """
    found = None
    if (path / "Annotations").is_dir():
        found = "llvip"
    elif path.suffix == ".jsonl":
        found = "jsonl"
    elif path.suffix == ".json":
        found = _format_of_json(next(json_rows(path), None))
    elif path.suffix == ".parquet" or is_saved_dataset(path):
        found = _format_of_columns(table_columns(path))
    if found is None:
        raise InputError(f"{path}: the format is not recognised; name one of {', '.join(sorted(FORMATS))}")
    return found


def _format_of_json(first: Row | None) -> str | None:
    row = first.value if first is not None and isinstance(first.value, dict) else {}
    if "conversations" in row:
        return "spatialqa" if "<image 1>" in str(row["conversations"]) else "conversations"
    if "content" in row:
        return "authors"
    return "spatialqa" if {"image", "question", "answer"} <= row.keys() else None


def _format_of_columns(columns: Sequence[str]) -> str | None:
    if "reward_model" in columns:
        return "verl"
    return "huggingface" if {"prompt", "answer"} <= set(columns) else None


def count_rows(path: Path, format: str, split: str | None = None) -> int:
    """How many rows `read_rows` will give; no image is read for it.

    Raises:
        InputError: the file or folder as a whole cannot be read, or there is no such split.
    """
    if path.suffix == ".parquet" or is_saved_dataset(path):
        return sum(open_table(path, split).lengths)
    return sum(1 for _ in FORMATS[format].rows(path, split))


def read_rows(
    path: Path, format: str, names: Sequence[str] | None = None, split: str | None = None
) -> Iterator[Record | InputError]:
    """Each row as a record, or as what is wrong with it, so that one wrong row spoils no other.

    An id that a format does not promise to be unique gets the row's number after it from its second time on: "scene-7#12".

    Raises:
        InputError: the file or folder as a whole cannot be read, or there is no such split.
    """
    known, seen = FORMATS[format], set[str]()
    for row in known.rows(path, split):
        try:
            record = known.record(row, names)
        except InputError as error:
            yield error
            continue
        if known.ids_repeat and record.record_id in seen:
            record = replace(record, record_id=f"{record.record_id}#{row.number}")
        seen.add(record.record_id)
        yield record


def read_records(path: Path, format: str, names: Sequence[str] | None = None, split: str | None = None) -> Iterator[Record]:
    """All records, in order; images are named and not opened.

    Args:
        names: source names in image order, for formats that don't name sources.
        split: the part to read, for formats that have splits; None for everything.

    Raises:
        InputError: a row is wrong (names file, row and field), or there is no such split.
    """
    for found in read_rows(path, format, names, split):
        if isinstance(found, InputError):
            raise found
        yield found
