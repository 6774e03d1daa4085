"""What a run trains on and is evaluated with: `open_data` reads the recipe's data section."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from mars_shared.errors import ConfigError
from mars_shared.settings import DataFiles, DataSection, DatasetName
from mars_trainer.datasets.base import Dataset, LazySplit, Sample, Split, stable_fraction
from mars_trainer.datasets.digits import DigitsDataset
from mars_trainer.datasets.files import name_of, read_files, samples_of, split_off
from mars_trainer.datasets.scene import SceneDataset

__all__ = [
    "Dataset",
    "DigitsDataset",
    "LazySplit",
    "RunData",
    "Sample",
    "SceneDataset",
    "Split",
    "load_dataset",
    "open_data",
    "open_held_out",
]

HeldOut = dict[str, Sequence[Sample]]
"""Held-out samples by dataset."""


@dataclass(frozen=True)
class RunData:
    """A run's samples, each made or opened when it is asked for; that raises InputError where
    its row is faulty or its images are not in order."""

    train: Sequence[Sample]
    held_out: HeldOut


@cache
def load_dataset(name: DatasetName | str) -> Dataset:
    """The dataset of that name; ValueError names the known ones if there is none."""
    match DatasetName(name):
        case DatasetName.DIGITS:
            return DigitsDataset()
        case DatasetName.SCENE:
            return SceneDataset()


def open_data(data: DataSection) -> RunData:
    """The samples to train on and those held out, `eval_samples` of each dataset.

    Raises:
        ConfigError: files cannot be read, too many rows are faulty, or nothing is left to train on or to hold out.
    """
    if data.dataset is not None:
        return RunData(load_dataset(data.dataset).train, open_held_out(data))
    train: list[Sequence[Sample]] = []
    held_out = _files_held_out(data)
    for files in data.train:
        records = read_files(files, data)
        if not data.test:
            records, kept_back = split_off(records, data.test_share)
            _add(held_out, files, data, samples_of(files, kept_back, max_image_pixels=data.max_image_pixels))
        train.append(samples_of(files, records, max_image_pixels=data.max_image_pixels))
    if not sum(map(len, train)):
        raise ConfigError(
            f"data.train has no row to train on, {sum(map(len, held_out.values()))} held out (data.test_share is "
            f"{data.test_share}); expected some of both: name files in data.test, or change the share"
        )
    return RunData(_chained(train), held_out)


def open_held_out(data: DataSection) -> HeldOut:
    """Only what evaluations use; files to train on are read only where their rows are held out.

    Raises:
        ConfigError: as `open_data`.
    """
    if data.test:
        return _files_held_out(data)
    if data.dataset is None:
        return open_data(data).held_out
    return {data.dataset.value: _first(load_dataset(data.dataset).test, data.eval_samples)}


def _files_held_out(data: DataSection) -> HeldOut:
    held_out: HeldOut = {}
    for files in data.test:
        records = read_files(files, data)
        _add(held_out, files, data, samples_of(files, records, max_image_pixels=data.max_image_pixels))
    return held_out


def _add(held_out: HeldOut, files: DataFiles, data: DataSection, samples: Sequence[Sample]) -> None:
    name = name_of(files)
    if name in held_out:
        raise ConfigError(f"two held-out datasets are called {name!r}; give them a `name` each")
    held_out[name] = _some(samples, data.eval_samples)


def _first(samples: Sequence[Sample], count: int) -> Sequence[Sample]:
    return LazySplit(min(count, len(samples)), samples.__getitem__)


def _some(samples: Sequence[Sample], count: int) -> Sequence[Sample]:
    """A selection that is spread over the rows, always the same, in the rows' order."""
    chosen = sorted(sorted(range(len(samples)), key=lambda row: stable_fraction(str(row).encode()))[:count])
    return LazySplit(len(chosen), lambda place: samples[chosen[place]])


def _chained(parts: Sequence[Sequence[Sample]]) -> Sequence[Sample]:
    places = [(samples, row) for samples in parts for row in range(len(samples))]
    return LazySplit(len(places), lambda place: places[place][0][places[place][1]])
