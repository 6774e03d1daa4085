"""Looks at every row of a dataset: all faults at once, and what the dataset is like."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mars_shared.bars import tracked
from mars_shared.errors import InputError
from mars_shared.images import open_image
from mars_trainer.datasets.formats import count_rows, read_rows
from mars_trainer.datasets.images import image_bytes
from mars_trainer.datasets.records import Record
from mars_trainer.datasets.thoughts import first_tag

SizePx = tuple[int, int]
PromptLength = Callable[[Record, Sequence[SizePx]], int]
"""Tokens of a record's multi-source prompt, from its images' sizes; raises InputError for a prompt that cannot be put."""


@dataclass
class Findings:
    """What a check found. `faults` has one line each, with file, row and field."""

    rows: int = 0
    faults: list[str] = field(default_factory=list)
    good: list[tuple[Record, tuple[SizePx, ...]]] = field(default_factory=list)
    """Records without a fault, with their images' sizes."""

    def statistics(self) -> dict[str, str]:
        """What the good records are like, by name; empty if there are none."""
        if not self.good:
            return {}
        sources = Counter(len(record.images) for record, _ in self.good)
        names = Counter(image.name for record, _ in self.good for image in record.images)
        sides = [size for _, sizes in self.good for size in sizes]
        boxes = [len(record.answer) for record, _ in self.good if not isinstance(record.answer, str)]
        texts = Counter(record.answer for record, _ in self.good if isinstance(record.answer, str))
        found = {
            "images a question": _counted(sources),
            "source names": _counted(names),
            "image width": _spread([width for width, _ in sides]),
            "image height": _spread([height for _, height in sides]),
        }
        if boxes:
            found["boxes a question"] = _spread(boxes)
        if texts:
            found["answers"] = f"{len(texts)} different; most frequent: {_counted(texts)}"
        return found


def check(
    path: Path,
    format: str,
    *,
    images: Path,
    names: Sequence[str] | None = None,
    known_sources: Sequence[str] | None = None,
    split: str | None = None,
    max_pixels: int,
    prompt_length: PromptLength | None = None,
    max_prompt_length: int = 0,
) -> Findings:
    """Read every row, open every image, compare every box with its image.

    Args:
        images: folder that image paths are below.
        known_sources: if given, another source name is a fault.
        split: the part of the dataset to look at; None for all of it.
        prompt_length: if given, a prompt of more than `max_prompt_length` tokens is a fault.

    Raises:
        InputError: the file or folder as a whole cannot be read.
    """
    findings, seen = Findings(), dict[str, str]()
    with tracked(read_rows(path, format, names, split), "checking", "row", count_rows(path, format, split)) as rows:
        for found in rows:
            findings.rows += 1
            if isinstance(found, InputError):
                findings.faults.append(str(found))
                continue
            sizes, faults = _sizes(found, images, max_pixels)
            faults += found.name_faults(known_sources) + _answer_faults(found)
            if found.record_id in seen:
                faults.append(f"{found.where}: id {found.record_id!r} is that of {seen[found.record_id]} too")
            seen.setdefault(found.record_id, found.where)
            if sizes[0] is not None:
                faults += found.box_faults(sizes[0])
            known_sizes = tuple(size for size in sizes if size is not None)
            if prompt_length is not None and len(known_sizes) == len(sizes):
                faults += _length_faults(found, known_sizes, prompt_length, max_prompt_length)
            findings.faults += faults
            if not faults:
                findings.good.append((found, known_sizes))
    return findings


def _answer_faults(record: Record) -> list[str]:
    tag = first_tag(record.answer) if isinstance(record.answer, str) else None
    if tag is None:
        return []
    return [
        f"{record.where}: answer: contains {tag!r}, which marks an answer or a chain of thought and is part of none; "
        "expected the answer alone"
    ]


def _length_faults(record: Record, sizes: Sequence[SizePx], prompt_length: PromptLength, most: int) -> list[str]:
    try:
        length = prompt_length(record, sizes)
    except InputError as error:
        return [str(error)]
    return [] if length <= most else [f"{record.where}: the prompt has {length} tokens; expected at most {most}"]


def _sizes(record: Record, folder: Path, max_pixels: int) -> tuple[list[SizePx | None], list[str]]:
    """The images' sizes, None for one that cannot be opened, and a fault for each of those."""
    sizes: list[SizePx | None] = []
    faults = []
    for image in record.images:
        try:
            data = image_bytes(record, image, folder)
            sizes.append(open_image(data, what=f"{record.where}: source {image.name!r}", max_pixels=max_pixels).size)
        except InputError as error:
            sizes.append(None)
            faults.append(str(error))
    return sizes, faults


def _counted(counter: Counter[str] | Counter[int], most: int = 5) -> str:
    shown = ", ".join(f"{value} ({count})" for value, count in counter.most_common(most))
    return shown + (", ..." if len(counter) > most else "")


def _spread(values: Sequence[int]) -> str:
    return f"{min(values)} to {max(values)}, median {statistics.median(values):g}"
