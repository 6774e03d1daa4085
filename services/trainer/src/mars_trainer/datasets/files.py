"""Datasets in files as samples: rows are read at the start, images when their sample is asked for."""

from __future__ import annotations

import logging
import math
import shlex
from collections.abc import Sequence
from pathlib import Path

from mars_shared.errors import ConfigError, InputError
from mars_shared.images import open_image
from mars_shared.settings import DataFiles, DataSection
from mars_trainer.datasets.base import LazySplit, Sample, stable_fraction
from mars_trainer.datasets.formats import FORMATS, data_path, format_of, read_rows
from mars_trainer.datasets.images import image_bytes
from mars_trainer.datasets.records import Record

logger = logging.getLogger(__name__)

SHOWN_FAULTS = 5


Readable = Record | InputError
"""A row: what it asks, or what is wrong with it."""


def read_files(files: DataFiles, data: DataSection) -> list[Readable]:
    """All rows of a dataset, of which a few may be faulty.

    Raises:
        ConfigError: no such file or format, no rows, or too many faulty rows: the first of them, each with file, row and field.
    """
    try:
        path = data_path(files.path)
        format = files.format or format_of(path)
        if format not in FORMATS:
            raise ConfigError(f"data format {format!r} is unknown; expected one of {', '.join(sorted(FORMATS))}")
        rows = [_checked(row, data.source_names) for row in read_rows(path, format, files.sources, files.split)]
    except InputError as error:
        raise ConfigError(f"dataset {files.path}: {error}") from error
    if not rows:
        raise ConfigError(f"dataset {files.path}: no rows; expected at least one")
    faults = [str(row) for row in rows if isinstance(row, InputError)]
    if faults:
        _refuse_or_warn(files, faults, len(rows), data)
    return rows


def _checked(row: Readable, known_sources: Sequence[str] | None) -> Readable:
    if isinstance(row, Record) and (faults := row.name_faults(known_sources)):
        return InputError("; ".join(faults))
    return row


def _refuse_or_warn(files: DataFiles, faults: Sequence[str], rows: int, data: DataSection) -> None:
    told = (
        f"dataset {files.path}: {len(faults)} of {rows} rows cannot be used: {'; '.join(faults[:SHOWN_FAULTS])}"
        f"{'; ...' if len(faults) > SHOWN_FAULTS else ''}. `{_check_command(files, data)}` lists all faults"
    )
    if len(faults) == rows or len(faults) > data.max_faulty_share * rows:
        raise ConfigError(f"{told}. data.max_faulty_share is {data.max_faulty_share:g}")
    logger.warning("%s", told)


def _check_command(files: DataFiles, data: DataSection) -> str:
    """The command that checks a dataset as the run reads it."""
    options = {
        "--format": files.format,
        "--split": files.split,
        "--images": files.images,
        "--sources": ",".join(files.sources or ()),
        "--known-sources": ",".join(data.source_names or ()),
    }
    given = [part for option, value in options.items() if value for part in (option, str(value))]
    return shlex.join(["mars", "data", "check", str(files.path), *given])


def samples_of(files: DataFiles, records: Sequence[Readable], *, max_image_pixels: int) -> Sequence[Sample]:
    """The rows as samples, each opened when it is asked for: InputError if the row is faulty or its images are not in order."""
    folder = files.images or (files.path if files.path.is_dir() else files.path.parent)
    return LazySplit(len(records), lambda row: _open(records[row], name_of(files), folder, max_image_pixels))


def name_of(files: DataFiles) -> str:
    """The name of a dataset in results: as the recipe says, else of its file or folder."""
    return files.name or files.path.stem


def split_off(records: Sequence[Readable], share: float) -> tuple[list[Readable], list[Readable]]:
    """Rows to train on, faulty ones too, and the held-out share of about this size, at least one row; the same rows each time.

    Rows that show the same image files are on the same side. Embedded images have no name to go by:
    there the row's id decides.
    """
    places = [_place(record) for record in records]
    bound = max(share, math.nextafter(min(places), 1))
    trained = [record for record, place in zip(records, places, strict=True) if place >= bound]
    return trained, [record for record, place in zip(records, places, strict=True) if place < bound]


def _place(record: Readable) -> float:
    if isinstance(record, InputError):
        return 1.0
    shown = [record.record_id] if any(image.embedded for image in record.images) else [str(image.path) for image in record.images]
    return stable_fraction("\n".join(shown).encode())


def _open(record: Readable, dataset: str, folder: Path, max_image_pixels: int) -> Sample:
    if isinstance(record, InputError):
        raise record
    images = {image.name: image_bytes(record, image, folder) for image in record.images}
    first, data = next(iter(images.items()))
    # Boxes are in pixels of the first image; text needs no size.
    size_px = (
        (1, 1)
        if isinstance(record.answer, str)
        else open_image(data, what=f"{record.where}: source {first!r}", max_pixels=max_image_pixels).size
    )
    return Sample(
        prompt_id=f"{dataset}/{record.record_id}",
        question=record.question,
        images=images,
        truth=record.truth(size_px),
        thought=record.thought,
        where=record.where,
    )
