"""Any dataset as our own JSON lines, whose image paths are below the folder of the file that is written where they can be."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from blake3 import blake3

from mars_shared.errors import InputError
from mars_shared.files import write_atomic
from mars_shared.images import media_type_of
from mars_trainer.datasets.images import image_bytes
from mars_trainer.datasets.jsonl import jsonl_line
from mars_trainer.datasets.records import NamedPath, Record

SUFFIXES = {"image/png": ".png", "image/jpeg": ".jpg", "image/webp": ".webp"}


@dataclass(frozen=True)
class Converted:
    """What was written: how many questions, and the folder that their image paths are below."""

    questions: int
    image_root: Path


def convert(records: Iterable[Record], out: Path, *, images: Path) -> Converted:
    """Write records to `out`. Images that stand in the dataset become files in the folder OUT-images.

    Other images are not opened. Their paths are written as seen from the folder of `out` if they are below it, else they stay.

    Args:
        images: folder that the records' image paths are below.

    Raises:
        InputError: a row is wrong, two have one id, or an embedded image is none; `out` is not written then.
    """
    root = _file_root(images, out)
    lines, seen, kinds = [], dict[str, str](), set[bool]()
    for record in records:
        if (other := seen.setdefault(record.record_id, record.where)) != record.where:
            raise InputError(f"{record.where}: id {record.record_id!r} is that of {other} too; expected each once")
        kinds |= {image.embedded is None for image in record.images}
        _check_one_root(kinds, record, out, root)
        placed = [_placed(record, image, out, images, root) for image in record.images]
        lines.append(jsonl_line(replace(record, images=tuple(placed))))
    write_atomic(out, "".join(f"{line}\n" for line in lines).encode())
    return Converted(len(lines), root if True in kinds else out.parent.resolve())


def _file_root(images: Path, out: Path) -> Path:
    own = out.parent.resolve()
    return own if images.resolve().is_relative_to(own) else images.resolve()


def _check_one_root(kinds: set[bool], record: Record, out: Path, root: Path) -> None:
    if len(kinds) > 1 and root != out.parent.resolve():
        raise InputError(
            f"{record.where}: some images stand in the dataset, others are files below {root}; "
            f"write {out.name} to that folder or to one above it, so that one folder holds all images"
        )


def _placed(record: Record, image: NamedPath, out: Path, images: Path, root: Path) -> NamedPath:
    if image.embedded is None:
        path = Path(os.path.normpath(images.resolve() / image.path))
        if not path.is_relative_to(root):
            raise InputError(f"{record.where}: source {image.name!r}: {image.path} lies outside the image folder {root}")
        return replace(image, path=path.relative_to(root))
    return _extracted(record, image, out.parent / f"{out.stem}-images", images)


def _extracted(record: Record, image: NamedPath, folder: Path, images: Path) -> NamedPath:
    """A file with an embedded image's bytes, named by their blake3, so that equal images are one file."""
    data = image_bytes(record, image, images)
    digest = blake3(data).hexdigest()
    file = folder / (digest + SUFFIXES[media_type_of(data, what=f"{record.where}: source {image.name!r}")])
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(file, data, durable=False)
    return NamedPath(image.name, file.relative_to(folder.parent), digest)
