"""Cells of Arrow tables: plain values, and images of which no byte is copied before it is asked for."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from mars_shared.errors import InputError

DATA_URI = "data:"
ReadCell = Callable[[], Any]
"""Reads one row's cell of one column as an Arrow scalar."""


@dataclass(frozen=True)
class StoredImage:
    """An image of a table's row: `embedded` reads its bytes, `path` says where it lies or came from."""

    path: str
    embedded: Callable[[], bytes] | None


def plain_value(kind: Any, value: Any) -> Any:
    """A cell's Python value of an Arrow type; JSON in it (the feature Json of the library datasets) is parsed."""
    import pyarrow

    if value is None:
        return None
    if isinstance(kind, pyarrow.JsonType):
        return json.loads(value)
    if _is_list(kind):
        return [plain_value(kind.value_type, item) for item in value]
    if pyarrow.types.is_struct(kind):
        return {field.name: plain_value(field.type, value[field.name]) for field in kind}
    return value


def stored_images(read: ReadCell, origin: str) -> list[StoredImage]:
    """The images of a cell: one, or a list; none if it is null.

    Args:
        origin: what stands in for the path of an image that has none.

    Raises:
        InputError: one is neither bytes nor a path.
    """
    return [_stored(part, partial(_read_bytes, read, index), f"{origin}.{index}") for index, part in enumerate(_parts(read()))]


def _parts(cell: Any) -> list[Any]:
    if not cell.is_valid:
        return []
    return list(cell.values) if _is_list(cell.type) else [cell]


def _stored(cell: Any, read: Callable[[], bytes], origin: str) -> StoredImage:
    fields = _fields(cell)
    path = _path(fields)
    if "bytes" in fields or path.startswith(DATA_URI):
        return StoredImage(origin if path.startswith(DATA_URI) else path or origin, read)
    if not path:
        raise InputError("an image is neither bytes nor a path; expected {bytes, path}, {image: path}, a path or bytes")
    return StoredImage(path, None)


def _fields(cell: Any) -> dict[str, Any]:
    """The parts of an image's cell that are not null: bytes, path, image (which some write for path)."""
    from pyarrow import types

    kind = cell.type
    if types.is_struct(kind):
        found = {name: cell[name] for name in ("bytes", "path", "image") if cell.is_valid and kind.get_field_index(name) >= 0}
    else:
        found = {"path" if types.is_string(kind) or types.is_large_string(kind) else "bytes": cell}
    return {name: part for name, part in found.items() if part.is_valid}


def _path(fields: dict[str, Any]) -> str:
    return next((str(fields[name].as_py()) for name in ("path", "image") if name in fields), "")


def _read_bytes(read: ReadCell, index: int) -> bytes:
    fields = _fields(_parts(read())[index])
    if "bytes" in fields:
        return bytes(fields["bytes"].as_py())
    header, _, data = _path(fields).partition(",")
    try:
        return base64.b64decode(data, validate=True)
    except ValueError as error:
        raise InputError(f"{header[:40]}: no base64 data URI ({error})") from error


def _is_list(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))
