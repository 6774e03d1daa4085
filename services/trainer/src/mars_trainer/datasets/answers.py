"""What a dataset gives as truth: a text, or boxes [[x1, y1, x2, y2], ...] in pixels of the first image."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import Field, StringConstraints, TypeAdapter, ValidationError

from mars_shared.errors import InputError
from mars_shared.http import explain_validation

Box = tuple[float, float, float, float]
Coordinate = Annotated[float, Field(allow_inf_nan=False)]
Answer = (
    Annotated[str, StringConstraints(pattern=r"\S")]
    | Annotated[list[tuple[Coordinate, Coordinate, Coordinate, Coordinate]], Field(min_length=1)]
)
"""An answer in a row's shape: a text that is not blank, or one or more boxes of finite numbers."""
_ANSWER: TypeAdapter[Any] = TypeAdapter(Answer)


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
        found = _ANSWER.validate_python(value)
    except ValidationError as error:
        raise InputError(f"{field}: {explain_validation(error.errors(include_url=False)[:3])}") from error
    return answer_value(found)


def answer_value(found: str | list[Box]) -> str | tuple[Box, ...]:
    """A validated answer as records hold it: text without spaces around it, or boxes."""
    return found.strip() if isinstance(found, str) else tuple(found)


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
