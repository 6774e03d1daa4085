"""LLVIP as it is published: Annotations/*.xml (VOC), visible/{train,test}/*.jpg, infrared/{train,test}/*.jpg."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree

from mars_shared.errors import InputError
from mars_trainer.datasets.answers import Box
from mars_trainer.datasets.records import Record, Row, name_images

QUESTION = "Detect every person in the scene that these images show."
SOURCES = ("visible", "infrared")
SPLITS = ("train", "test")
CORNERS = ("xmin", "ymin", "xmax", "ymax")


def llvip_rows(folder: Path, split: str | None) -> Iterator[Row]:
    """One row for each annotation file, in order of name; `value` is its path.

    Args:
        split: train or test, which are told apart by the image folders; None for both.

    Raises:
        InputError: the folder has no annotations, or the split is another.
    """
    if split not in (None, *SPLITS):
        raise InputError(f"{folder}: no split {split!r}; expected one of {', '.join(SPLITS)}")
    files = sorted((folder / "Annotations").glob("*.xml"))
    if not files:
        raise InputError(f"{folder}: no Annotations/*.xml; expected the folder of LLVIP")
    for number, file in enumerate(files):
        if split is None or _has_image(folder, split, file.stem):
            yield Row(str(file), number, file)


def _has_image(folder: Path, split: str, stem: str) -> bool:
    return any((folder / kind / split / f"{stem}.jpg").is_file() for kind in SOURCES)


def llvip_record(row: Row, names: Sequence[str] | None) -> Record:
    """An annotation and its two images.

    Raises:
        InputError: the file is no VOC annotation with a person, or neither split has an image of it.
    """
    file: Path = row.value
    folder = file.parent.parent
    split = next((split for split in SPLITS if _has_image(folder, split, file.stem)), None)
    if split is None:
        raise InputError(f"{row.where}: neither train nor test of visible and infrared has {file.stem}.jpg")
    root = _annotation(file, row.where)
    return Record(
        where=row.where,
        record_id=f"{split}/{file.stem}",
        question=QUESTION,
        images=name_images([f"{kind}/{split}/{file.stem}.jpg" for kind in SOURCES], names or SOURCES, row.where),
        answer=_boxes(root, row.where),
        size_px=_size_px(root, row.where),
    )


def _annotation(file: Path, where: str) -> ElementTree.Element:
    try:
        return ElementTree.fromstring(file.read_bytes())
    except (OSError, ElementTree.ParseError) as error:
        raise InputError(f"{where}: not XML ({error}); expected a VOC annotation") from error


def _boxes(root: ElementTree.Element, where: str) -> tuple[Box, ...]:
    boxes = tuple(_box(item, f"{where}: object {index}") for index, item in enumerate(root.iter("object")))
    if not boxes:
        raise InputError(f"{where}: no object; expected at least one person")
    return boxes


def _size_px(root: ElementTree.Element, where: str) -> tuple[int, int] | None:
    """(width, height) of the images, if the annotation states it."""
    width, height = (root.findtext(f"size/{side}") for side in ("width", "height"))
    if width is None or height is None:
        return None
    try:
        return int(width), int(height)
    except ValueError as error:
        raise InputError(f"{where}: size is {width!r} x {height!r}; expected whole numbers of pixels") from error


def _box(item: ElementTree.Element, where: str) -> Box:
    values = []
    for corner in CORNERS:
        text = item.findtext(f"bndbox/{corner}")
        if text is None:
            raise InputError(f"{where}: bndbox/{corner} is missing")
        try:
            values.append(float(text))
        except ValueError as error:
            raise InputError(f"{where}: bndbox/{corner} is {text!r}; expected a number") from error
    x1, y1, x2, y2 = values
    return x1, y1, x2, y2
