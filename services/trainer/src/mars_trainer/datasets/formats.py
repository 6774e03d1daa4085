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

    rows: Callable[[Path], Iterator[Row]]
    record: Callable[[Row, Sequence[str] | None], Record]


FORMATS: Mapping[str, Format] = {
    "authors": Format(json_rows, authors_record),
    "conversations": Format(json_rows, conversation_record),
    "jsonl": Format(jsonl_rows, jsonl_record),
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


def read_records(path: Path, format: str, names: Sequence[str] | None = None) -> Iterator[Record]:
    """All records, in order; images are named and not opened.

    Args:
        names: source names in image order, for formats that don't name sources.

    Raises:
        InputError: a row is wrong; names file, row and field.
    """
    known = FORMATS[format]
    return (known.record(row, names) for row in known.rows(path))
