"""Rows of dataset files: questions about named images on disk, none of which is opened yet."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from mars_shared.contracts import BoxesTruth, TextTruth, Truth
from mars_shared.errors import InputError
from mars_shared.http import explain_validation

Box = tuple[float, float, float, float]
Row = TypeVar("Row", bound=BaseModel)


@dataclass(frozen=True)
class NamedPath:
    """An image of a record. `path` is as the file states it, below the dataset's image folder."""

    name: str
    path: Path


@dataclass(frozen=True)
class Record:
    """A question as a dataset file states it.

    Attributes:
        where: file and row, for errors: "llvip_eval.json row 17".
        images: in the order in which the question shows them.
        answer: the truth as text, or as boxes in pixels of the first image.
    """

    where: str
    record_id: str
    question: str
    images: tuple[NamedPath, ...]
    answer: str | tuple[Box, ...]

    def truth(self, size_px: tuple[int, int]) -> Truth:
        """The truth in terms of the first image's (width, height).

        Raises:
            InputError: a box is inside out or lies outside the image.
        """
        if isinstance(self.answer, str):
            return TextTruth(text=self.answer)
        width, height = size_px
        for index, (x1, y1, x2, y2) in enumerate(self.answer):
            if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
                raise InputError(
                    f"{self.where}: box {index} is ({x1:g}, {y1:g}, {x2:g}, {y2:g}); expected x1 < x2 and y1 < y2 "
                    f"inside the image of {width} x {height} pixels"
                )
        return BoxesTruth(boxes=self.answer, width_px=width, height_px=height)


def source_names(count: int, given: Sequence[str] | None, where: str) -> tuple[str, ...]:
    """Names of a row's images: the given ones, or image-1, image-2, ...

    Raises:
        InputError: fewer names were given than the row has images.
    """
    if given is None:
        return tuple(f"image-{number}" for number in range(1, count + 1))
    if len(given) < count:
        raise InputError(f"{where}: {count} images, but only {len(given)} source names were given: {', '.join(given)}")
    return tuple(given[:count])


def json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(where, value) of every item of a JSON file that holds a list.

    Raises:
        InputError: the file cannot be read, is no JSON, or holds no list.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); expected a JSON file") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error})") from error
    if not isinstance(values, list):
        raise InputError(f"{path}: holds a {type(values).__name__}; expected a list of rows")
    for index, value in enumerate(values):
        yield f"{path} row {index}", value


def parsed(row: type[Row], value: Any, where: str) -> Row:
    """A row in the shape that its format asks for.

    Raises:
        InputError: a field is missing or wrong; names file, row and field.
    """
    try:
        return row.model_validate(value)
    except ValidationError as error:
        raise InputError(f"{where}: {explain_validation(error.errors(include_url=False)[:5])}") from error
