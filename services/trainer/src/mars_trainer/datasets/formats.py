"""The dataset formats we read: how a file or folder becomes rows, and a row a record."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mars_shared.errors import InputError
from mars_trainer.datasets.authors import authors_record
from mars_trainer.datasets.conversations import conversation_record
from mars_trainer.datasets.jsonl import jsonl_record
from mars_trainer.datasets.llvip import llvip_record, llvip_rows
from mars_trainer.datasets.records import Record, Row, json_rows, jsonl_rows


@dataclass(frozen=True)
class Format:
    """`rows` raises InputError for the whole, `record` for one row, so that one wrong row spoils no other."""

    rows: Callable[[Path, str | None], Iterator[Row]]
    """Rows of a file or folder: those of a split, or all if that is None."""
    record: Callable[[Row, Sequence[str] | None], Record]
    """A row as a record, with the given source names."""


def _whole(rows: Callable[[Path], Iterator[Row]]) -> Callable[[Path, str | None], Iterator[Row]]:
    """Rows of a format that has no splits."""

    def read(path: Path, split: str | None) -> Iterator[Row]:
        if split is not None:
            raise InputError(f"{path}: split {split!r} was asked for, but files of this format have no splits; leave it out")
        return rows(path)

    return read


FORMATS: Mapping[str, Format] = {
    "authors": Format(_whole(json_rows), authors_record),
    "conversations": Format(_whole(json_rows), conversation_record),
    "jsonl": Format(_whole(jsonl_rows), jsonl_record),
    "llvip": Format(llvip_rows, llvip_record),
}


def format_of(path: Path) -> str:
    """The name of the format that a file or folder looks like.

    Raises:
        InputError: it looks like none of them.
    """
    if (path / "Annotations").is_dir():
        return "llvip"
    if path.suffix == ".jsonl":
        return "jsonl"
    if path.suffix == ".json":
        first = next(json_rows(path), None)
        keys = first.value.keys() if first is not None and isinstance(first.value, dict) else ()
        for key, name in (("conversations", "conversations"), ("content", "authors")):
            if key in keys:
                return name
    raise InputError(f"{path}: the format is not recognised; name one of {', '.join(sorted(FORMATS))}")


def read_records(path: Path, format: str, names: Sequence[str] | None = None, split: str | None = None) -> Iterator[Record]:
    """All records, in order; images are named and not opened.

    Args:
        names: source names in image order, for formats that don't name sources.
        split: the part to read, for formats that have splits; None for everything.

    Raises:
        InputError: a row is wrong (names file, row and field), or there is no such split.
    """
    known = FORMATS[format]
    return (known.record(row, names) for row in known.rows(path, split))
