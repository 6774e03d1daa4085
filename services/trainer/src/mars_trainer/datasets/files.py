"""Datasets in files as samples: rows are read at the start, images when their sample is asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from mars_shared.errors import ConfigError, InputError
from mars_shared.images import open_image
from mars_shared.settings import DataFiles
from mars_trainer.datasets.base import LazySplit, Sample, stable_fraction
from mars_trainer.datasets.formats import FORMATS, data_path, format_of, read_rows
from mars_trainer.datasets.images import image_bytes
from mars_trainer.datasets.records import Record

SHOWN_FAULTS = 5


def read_files(files: DataFiles, known_sources: Sequence[str] | None = None) -> list[Record]:
    """All rows of a dataset.

    Args:
        known_sources: names that its images may have; None: any.

    Raises:
        ConfigError: no such file or format, no rows, or faulty rows: the first of them, each with file, row and field.
    """
    try:
        path = data_path(files.path)
        format = files.format or format_of(path)
        if format not in FORMATS:
            raise ConfigError(f"data format {format!r} is unknown; expected one of {', '.join(sorted(FORMATS))}")
        rows = list(read_rows(path, format, files.sources, files.split))
    except InputError as error:
        raise ConfigError(f"dataset {files.path}: {error}") from error
    records = [row for row in rows if isinstance(row, Record)]
    faults = [str(row) for row in rows if isinstance(row, InputError)]
    faults += [fault for record in records for fault in record.name_faults(known_sources)]
    if faults:
        raise ConfigError(
            f"dataset {files.path}: {len(faults)} of {len(rows)} rows cannot be used: {'; '.join(faults[:SHOWN_FAULTS])}"
            f"{'; ...' if len(faults) > SHOWN_FAULTS else ''}. `mars data check {files.path}` lists all faults"
        )
    if not records:
        raise ConfigError(f"dataset {files.path}: no rows; expected at least one")
    return records


def samples_of(files: DataFiles, records: Sequence[Record], *, max_image_pixels: int) -> Sequence[Sample]:
    """The records as samples, each opened when it is asked for, which raises InputError if its images are not in order."""
    folder = files.images or (files.path if files.path.is_dir() else files.path.parent)
    return LazySplit(len(records), lambda row: _open(records[row], name_of(files), folder, max_image_pixels))


def name_of(files: DataFiles) -> str:
    """The name of a dataset in results: as the recipe says, else of its file or folder."""
    return files.name or files.path.stem


def split_off(records: Sequence[Record], share: float) -> tuple[list[Record], list[Record]]:
    """Rows to train on, and the held-out share of about this size, at least one row; the same rows each time.

    Rows that show the same image files are on the same side. Embedded images have no name to go by:
    there the row's id decides.
    """
    places = [_place(record) for record in records]
    bound = max(share, math.nextafter(min(places), 1))
    trained = [record for record, place in zip(records, places, strict=True) if place >= bound]
    return trained, [record for record, place in zip(records, places, strict=True) if place < bound]


def _place(record: Record) -> float:
    shown = [record.record_id] if any(image.embedded for image in record.images) else [str(image.path) for image in record.images]
    return stable_fraction("\n".join(shown).encode())


def _open(record: Record, dataset: str, folder: Path, max_image_pixels: int) -> Sample:
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
