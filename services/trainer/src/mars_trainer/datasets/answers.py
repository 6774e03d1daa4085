"""What a dataset gives as truth: a text, or boxes [[x1, y1, x2, y2], ...] in pixels of the first image."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import PlainValidator

from mars_shared.errors import InputError

Box = tuple[float, float, float, float]
LARGEST = 2**53
"""Coordinates are below it; NaN and infinities are not."""


def _text_or_boxes(value: Any) -> str | tuple[Box, ...]:
    """Text without spaces around it, or boxes; raises ValueError if it is blank, empty or anything else."""
    if isinstance(value, str) and value.strip():
        return value.strip()
    if isinstance(value, list | tuple) and value:
        return tuple(_box(index, item) for index, item in enumerate(value))
    raise ValueError("expected a text that is not blank, or boxes [[x1, y1, x2, y2], ...]")


def _box(index: int, value: Any) -> Box:
    numbers = list(value) if isinstance(value, list | tuple) else []
    if len(numbers) != 4 or not all(type(number) in (int, float) and abs(number) < LARGEST for number in numbers):
        raise ValueError(f"box {index} is {value!r}; expected four finite numbers x1, y1, x2, y2")
    x1, y1, x2, y2 = map(float, numbers)
    return x1, y1, x2, y2


Answer = Annotated[str | tuple[Box, ...], PlainValidator(_text_or_boxes)]
"""An answer in a row's shape: a text that is not blank, or one or more boxes of finite numbers."""


def read_answer(value: Any, field: str) -> str | tuple[Box, ...]:
    """An answer from a column that may hold boxes as JSON text.

    Args:
        field: file, row and field, for errors.

    Raises:
        InputError: neither text nor boxes; or text that looks like boxes and cannot be read as such.
    """
    if isinstance(value, str) and "".join(value.split()).startswith("[["):
        value = _boxes_of_text(value, field)
    elif isinstance(value, str) and _is_one_flat_box(value):
        raise InputError(f"{field}: {value} looks like a single box; expected a list of boxes, [{value}]")
    try:
        return _text_or_boxes(value)
    except ValueError as error:
        raise InputError(f"{field}: {error} (got {str(value)[:80]!r})") from error


def _boxes_of_text(text: str, field: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{field}: looks like boxes, but is no JSON ({error})") from error


def _is_one_flat_box(text: str) -> bool:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, list) and len(value) == 4 and all(type(item) in (int, float) for item in value)
