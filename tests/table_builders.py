"""Small tables with images in them: datasets saved to disk, and Parquet files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet

from builders import image_bytes

RED, BLUE = image_bytes((60, 40), color=(200, 0, 0)), image_bytes((30, 20), color=(0, 0, 200), format="JPEG")


def chat(*parts: Any, system: str | None = None) -> list[dict[str, Any]]:
    """A conversation with content in parts; None is the place of an image."""
    content = [{"type": "image", "text": None} if part is None else {"type": "text", "text": part} for part in parts]
    before = [] if system is None else [{"role": "system", "content": [{"type": "text", "text": system}]}]
    return [*before, {"role": "user", "content": content}]


def trl_row(number: int = 0, **more: Any) -> dict[str, Any]:
    images = [{"bytes": RED, "path": None}, {"bytes": BLUE, "path": "blue.jpg"}]
    return {"prompt": chat(None, None, "Which?"), "images": images, "answer": "cat", "id": f"q{number}"} | more


def verl_row(number: int = 0, truth: Any = "cat", **more: Any) -> dict[str, Any]:
    return {
        "data_source": "llvip",
        "prompt": [{"role": "user", "content": "<image><image>Which?"}],
        "images": [{"bytes": RED, "path": None}, {"bytes": BLUE, "path": "blue.jpg"}],
        "reward_model": {"style": "rule", "ground_truth": truth},
        "extra_info": {"index": number, "split": "train"},
    } | more


def as_dataset(*rows: dict[str, Any]) -> Any:
    """A Dataset whose `images` (or `image`) has the feature Image if its cells are {bytes, path}."""
    made = datasets.Dataset.from_list(list(rows))
    if isinstance(rows[0].get("images", [""])[0], dict):
        made = made.cast_column("images", datasets.List(datasets.Image()))
    return made


def saved(folder: Path, *rows: dict[str, Any], **splits: list[dict[str, Any]]) -> Path:
    """A folder as save_to_disk writes it: of one Dataset, or of a DatasetDict if splits are given."""
    whole = datasets.DatasetDict({name: as_dataset(*part) for name, part in splits.items()}) if splits else as_dataset(*rows)
    datasets.disable_progress_bars()
    whole.save_to_disk(folder)
    return folder


def parquet(path: Path, *rows: dict[str, Any], group: int = 2) -> Path:
    """A Parquet file with row groups of `group` rows."""
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path, row_group_size=group)
    return path
