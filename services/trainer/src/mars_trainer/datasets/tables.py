"""Tables with images in them, read a piece at a time: Parquet files, and what the library datasets saves to disk.

Rows are read without their images' bytes; those are fetched when an image is asked for. Of a saved
dataset that is a look into a mapped file. Of a Parquet file it reads the row group again, of which the last few are kept:
memory stays at a few row groups, so files with small ones (100 rows, say) are read best.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from mars_shared.errors import InputError
from mars_trainer.datasets.cells import plain_value, stored_images
from mars_trainer.datasets.records import NamedPath, Row, name_images

IMAGE_COLUMNS = ("images", "image")
KEPT_PIECES = 4
_READING_ERRORS = (OSError, ValueError, KeyError, TypeError)
"""What pyarrow and datasets raise on files that are broken or of another kind (ArrowInvalid is a ValueError)."""


@dataclass(frozen=True)
class Table:
    """A table in pieces.

    Attributes:
        path: the file or folder.
        lengths: rows of each piece.
        piece: the pyarrow table of that number.
    """

    path: Path
    columns: Sequence[str]
    lengths: Sequence[int]
    piece: Callable[[int], Any]


def is_saved_dataset(path: Path) -> bool:
    """Whether a folder was written by save_to_disk of a Dataset or a DatasetDict."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def table_columns(path: Path) -> Sequence[str]:
    """Columns of a Parquet file or saved dataset; of several splits, those of the first.

    Raises:
        InputError: it cannot be read.
    """
    splits = _splits(path)
    return open_table(path, splits[0] if splits else None).columns


def table_rows(path: Path, split: str | None, *, needed: Sequence[str]) -> Iterator[Row]:
    """Rows as {column: value}; an image column holds a list of `StoredImage`, or a text that says what is wrong with it.

    Args:
        needed: columns without which no row can be read.

    Raises:
        InputError: the table cannot be read, lacks a column, or has other splits.
    """
    table = open_table(path, split)
    missing = [name for name in needed if name not in table.columns]
    if missing:
        raise InputError(f"{table.path}: no column {', '.join(missing)}; its columns are {', '.join(table.columns)}")
    number = 0
    for piece, length in enumerate(table.lengths):
        for offset in range(length):
            where = f"{table.path} row {number}"
            yield Row(where, number, {name: _value(table, piece, offset, name, where) for name in table.columns})
            number += 1


def row_images(row: Row, names: Sequence[str] | None) -> tuple[NamedPath, ...]:
    """A row's images under the given source names.

    Raises:
        InputError: the row has no images, one is neither bytes nor a path, or there are too few names.
    """
    column = next((name for name in IMAGE_COLUMNS if row.value.get(name)), None)
    if column is None:
        raise InputError(f"{row.where}: images: none; expected at least one in column images or image")
    found = row.value[column]
    if isinstance(found, str):
        raise InputError(found)
    named = name_images([image.path for image in found], names, row.where)
    return tuple(NamedPath(name.name, name.path, embedded=image.embedded) for name, image in zip(named, found, strict=True))


def open_table(path: Path, split: str | None) -> Table:
    """A Parquet file, or a dataset that was saved to disk.

    Raises:
        InputError: it cannot be read, or has no such split.
    """
    splits = _splits(path)
    if splits and split not in splits:
        asked = "no split was named" if split is None else f"no split {split!r}"
        raise InputError(f"{path}: {asked}; expected one of {', '.join(splits)}")
    if not splits and split is not None:
        raise InputError(f"{path}: split {split!r} was asked for, but it has no splits; leave it out")
    try:
        return _open_saved(path / split if split else path) if path.is_dir() else _open_parquet(path)
    except _READING_ERRORS as error:
        raise InputError(f"{path}: cannot be read ({error}); expected Parquet, or a folder of save_to_disk") from error


def _splits(path: Path) -> list[str]:
    """Splits of a saved DatasetDict; of anything else none."""
    file = path / "dataset_dict.json"
    if not file.is_file():
        return []
    try:
        return [str(name) for name in json.loads(file.read_bytes())["splits"]]
    except _READING_ERRORS as error:
        raise InputError(f"{file}: cannot be read ({error}); expected the names of splits") from error


def _open_saved(folder: Path) -> Table:
    from datasets import load_from_disk

    mapped = load_from_disk(str(folder)).with_format("arrow")[:]
    return Table(folder, mapped.column_names, [mapped.num_rows], lambda number: mapped)


def _open_parquet(path: Path) -> Table:
    from pyarrow.parquet import ParquetFile

    @lru_cache(maxsize=KEPT_PIECES)
    def piece(number: int) -> Any:
        try:
            with ParquetFile(path) as file:
                return file.read_row_group(number)
        except _READING_ERRORS as error:
            raise InputError(f"{path}: row group {number} cannot be read ({error})") from error

    with ParquetFile(path) as file:
        groups = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
        return Table(path, file.schema_arrow.names, groups, piece)


def _value(table: Table, piece: int, offset: int, column: str, where: str) -> Any:
    read = partial(_cell, table, piece, offset, column)
    if column not in IMAGE_COLUMNS:
        cell = read()
        return plain_value(cell.type, cell.as_py())
    try:
        return stored_images(read, f"{where} {column}")
    except InputError as error:
        return f"{where}: {column}: {error}"


def _cell(table: Table, piece: int, offset: int, column: str) -> Any:
    return table.piece(piece).column(column)[offset]
