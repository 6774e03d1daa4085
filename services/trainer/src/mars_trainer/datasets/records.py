"""Rows of dataset files: questions about named images, none of which is opened yet."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from mars_shared.contracts import BoxesTruth, TextTruth, Truth
from mars_shared.contracts.prompt import SOURCE_NAME
from mars_shared.errors import InputError
from mars_shared.frames import box_faults
from mars_shared.http import explain_validation
from mars_trainer.datasets.answers import Box

Shape = TypeVar("Shape", bound=BaseModel)
MAX_SOURCES = 64
"""Images of one prompt."""


@dataclass(frozen=True)
class Row:
    """One row of a dataset file as it was read. `where` names file and row in errors."""

    where: str
    number: int
    value: Any


@dataclass(frozen=True)
class NamedPath:
    """An image of a record, not read yet; `mars_trainer.datasets.images.image_bytes` reads it.

    Attributes:
        path: below the dataset's image folder; of an embedded image, only where it came from.
        blake3: of its bytes, if the dataset states it.
        embedded: reads the bytes of an image that stands in the dataset itself; raises InputError.
    """

    name: str
    path: Path
    blake3: str | None = None
    embedded: Callable[[], bytes] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Record:
    """A question as a dataset file states it.

    Attributes:
        images: in the order in which the question shows them.
        answer: the truth as text, or as boxes in pixels of the first image.
        thought: a chain of thought that leads to the answer, if the dataset has one.
        size_px: (width, height) that the dataset states of the first image, if it does.
    """

    where: str
    record_id: str
    question: str
    images: tuple[NamedPath, ...]
    answer: str | tuple[Box, ...]
    thought: str | None = None
    size_px: tuple[int, int] | None = None

    def name_faults(self, known: Sequence[str] | None = None) -> list[str]:
        """One line for each source name that no prompt can carry, or that is not among the `known` ones, and for too many."""
        names = [image.name for image in self.images]
        faults = [] if len(names) <= MAX_SOURCES else [f"{self.where}: {len(names)} images; expected at most {MAX_SOURCES}"]
        faults += [
            f"{self.where}: source name {name!r}; expected letters, digits, spaces, '_', '.', '-', at most 64"
            for name in names
            if not re.fullmatch(SOURCE_NAME, name)
        ]
        return faults + [
            f"{self.where}: source {name!r} is not one of data.source_names ({', '.join(known)})"
            for name in names
            if known is not None and name not in known
        ]

    def truth(self, size_px: tuple[int, int]) -> Truth:
        """The truth in terms of the first image's (width, height).

        Raises:
            InputError: a box is inside out or lies outside the image.
        """
        if isinstance(self.answer, str):
            return TextTruth(text=self.answer)
        if faults := self.box_faults(size_px):
            raise InputError("; ".join(faults))
        width, height = size_px
        return BoxesTruth(boxes=self.answer, width_px=width, height_px=height)

    def box_faults(self, size_px: tuple[int, int]) -> list[str]:
        """One line for another size than the dataset states, and for each box inside out or outside the first image."""
        width, height = size_px
        stated = self.size_px or size_px
        wrong_size = (
            []
            if stated == size_px
            else [f"{self.where}: states {stated[0]} x {stated[1]} pixels; the image has {width} x {height}"]
        )
        boxes = () if isinstance(self.answer, str) else self.answer
        return wrong_size + [f"{self.where}: answer: {fault}" for fault in box_faults(boxes, size_px)]


def name_images(paths: Sequence[str], names: Sequence[str] | None, where: str) -> tuple[NamedPath, ...]:
    """A row's images under the given source names, or as image-1, image-2, ...

    Raises:
        InputError: fewer names were given than the row has images, or one twice.
    """
    if names and len(set(names)) != len(names):
        raise InputError(f"{where}: source names are {', '.join(names)}; expected each once")
    chosen = names or [f"image-{number}" for number in range(1, len(paths) + 1)]
    if len(chosen) < len(paths):
        raise InputError(f"{where}: {len(paths)} images, but only {len(chosen)} source names were given: {', '.join(chosen)}")
    return tuple(NamedPath(name, Path(path)) for name, path in zip(chosen, paths, strict=False))


def json_rows(path: Path) -> Iterator[Row]:
    """The items of a JSON file that holds a list.

    Raises:
        InputError: the file cannot be read, is no JSON, or holds no list.
    """
    try:
        values = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error})") from error
    if not isinstance(values, list):
        raise InputError(f"{path}: holds a {type(values).__name__}; expected a list of rows")
    for number, value in enumerate(values):
        yield Row(f"{path} row {number}", number, value)


def jsonl_rows(path: Path) -> Iterator[Row]:
    """The lines of a file, unparsed, without empty ones.

    Raises:
        InputError: the file cannot be read.
    """
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            yield Row(f"{path} line {number}", number, line)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); expected a UTF-8 text file") from error


def shaped(shape: type[Shape], row: Row) -> Shape:
    """The row's value in the shape that its format asks for; a text is parsed as JSON first.

    Raises:
        InputError: a field is missing or wrong; names file, row and field.
    """
    try:
        return shape.model_validate_json(row.value) if isinstance(row.value, str) else shape.model_validate(row.value)
    except ValidationError as error:
        raise InputError(f"{row.where}: {explain_validation(error.errors(include_url=False)[:5])}") from error
