"""Where the bytes of a record's images come from: the one place that reads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from blake3 import blake3

from mars_shared.errors import InputError
from mars_trainer.datasets.records import NamedPath, Record


def image_bytes(record: Record, image: NamedPath, folder: Path) -> bytes:
    """An image's encoded bytes, as the dataset holds them or as its file does.

    Args:
        folder: that image paths are below; unused for an embedded image.

    Raises:
        InputError: the file is missing, outside the folder, or has another hash than stated; the dataset cannot be read.
    """
    what = f"{record.where}: source {image.name!r}"
    data = _file_bytes(image.path, folder, what) if image.embedded is None else _embedded_bytes(image.embedded, what)
    if image.blake3 is not None and (actual := blake3(data).hexdigest()) != image.blake3:
        raise InputError(f"{what}: {image.path} has blake3 {actual}; expected {image.blake3}")
    return data


def _file_bytes(path: Path, folder: Path, what: str) -> bytes:
    if "\0" in str(path):
        raise InputError(f"{what}: {str(path)!r} holds a null character; expected the path of an image")
    file = (folder / path).resolve()
    if not file.is_relative_to(folder.resolve()):
        raise InputError(f"{what}: {path} lies outside the image folder {folder}")
    try:
        return file.read_bytes()
    except OSError as error:
        raise InputError(f"{what}: {file} cannot be read ({error.strerror})") from error


def _embedded_bytes(read: Callable[[], bytes], what: str) -> bytes:
    try:
        return read()
    except InputError as error:
        raise InputError(f"{what}: {error}") from error
