"""Any dataset as our own JSON lines, whose image paths are below the folder of the file that is written."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from blake3 import blake3

from mars_shared.errors import InputError
from mars_shared.files import write_atomic
from mars_shared.images import media_type_of
from mars_trainer.datasets.images import image_bytes
from mars_trainer.datasets.jsonl import jsonl_line
from mars_trainer.datasets.records import NamedPath, Record

SUFFIXES = {"image/png": ".png", "image/jpeg": ".jpg", "image/webp": ".webp"}


def convert(records: Iterable[Record], out: Path, *, images: Path) -> int:
    """Write records to `out`; returns how many. Images that stand in the dataset become files in the folder OUT-images.

    Paths of other images are written as seen from `out`, so these images must lie below its folder.

    Args:
        images: folder that the records' image paths are below.

    Raises:
        InputError: a row is wrong, two have one id, an image is none, or lies elsewhere; nothing is written to `out` then.
    """
    folder = out.parent / f"{out.stem}-images"
    lines, seen = [], dict[str, str]()
    for record in records:
        if (other := seen.setdefault(record.record_id, record.where)) != record.where:
            raise InputError(f"{record.where}: id {record.record_id!r} is that of {other} too; expected each once")
        placed = [_placed(record, image, out, folder, images) for image in record.images]
        lines.append(jsonl_line(replace(record, images=tuple(placed))))
    write_atomic(out, "".join(f"{line}\n" for line in lines).encode())
    return len(lines)


def _placed(record: Record, image: NamedPath, out: Path, folder: Path, images: Path) -> NamedPath:
    if image.embedded is not None:
        return _extracted(record, image, folder, images)
    path = Path(os.path.normpath(images.absolute() / image.path))
    root = out.parent.absolute()
    if not path.is_relative_to(root):
        raise InputError(
            f"{record.where}: source {image.name!r}: {path} lies outside {root}, the folder of {out.name}; "
            f"write {out.name} to a folder that its images are below"
        )
    return replace(image, path=path.relative_to(root))


def _extracted(record: Record, image: NamedPath, folder: Path, images: Path) -> NamedPath:
    """A file with an embedded image's bytes, named by their blake3, so that equal images are one file."""
    data = image_bytes(record, image, images)
    digest = blake3(data).hexdigest()
    file = folder / (digest + SUFFIXES[media_type_of(data, what=f"{record.where}: source {image.name!r}")])
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(file, data, durable=False)
    return NamedPath(image.name, file.relative_to(folder.parent), digest)
