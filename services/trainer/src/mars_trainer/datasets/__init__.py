"""Datasets that need no download: `load_dataset` knows them by name."""

from __future__ import annotations

from functools import cache

from mars_shared.settings import DatasetName
from mars_trainer.datasets.base import Dataset, LazySplit, Sample, Split
from mars_trainer.datasets.digits import DigitsDataset
from mars_trainer.datasets.scene import SceneDataset

__all__ = ["Dataset", "DigitsDataset", "LazySplit", "Sample", "SceneDataset", "Split", "load_dataset"]


@cache
def load_dataset(name: DatasetName | str) -> Dataset:
    """The dataset of that name; ValueError names the known ones if there is none."""
    match DatasetName(name):
        case DatasetName.DIGITS:
            return DigitsDataset()
        case DatasetName.SCENE:
            return SceneDataset()
