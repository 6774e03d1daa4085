"""The built-in datasets: the same sample every time, and nothing of the test split in training."""

from __future__ import annotations

import io
import itertools
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from mars_shared.contracts import BoxesTruth, TextTruth
from mars_shared.settings import DatasetName
from mars_trainer.datasets import DigitsDataset, SceneDataset, Split, load_dataset
from mars_trainer.datasets.base import PAIR, Dataset, SampleKind
from mars_trainer.datasets.figures import place_persons, sensor_pattern

BOTH = pytest.mark.parametrize("name", list(DatasetName))


def _pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)), dtype=np.int64)


@BOTH
def test_a_sample_depends_on_its_place_alone_and_not_on_what_was_read_before(name: DatasetName) -> None:
    first, second = load_dataset(name), load_dataset(name)
    np.random.seed(1)
    backwards = [second.train[index] for index in (9, 5, 0)]
    np.random.seed(2)
    assert [first.train[index] for index in (0, 5, 9)] == backwards[::-1]


@BOTH
def test_neighbours_and_splits_differ(name: DatasetName) -> None:
    dataset = load_dataset(name)
    samples = [dataset.train[0], dataset.train[1], dataset.test[0], dataset.warmup[0]]
    assert len({data for sample in samples for data in sample.images.values()}) == 7
    assert len({sample.prompt_id for sample in samples}) == 4


@BOTH
def test_splits_behave_as_sequences(name: DatasetName) -> None:
    test = load_dataset(name).test
    assert test[-1] == test[len(test) - 1]
    assert [sample.prompt_id for sample in test[1:6:2]] == [f"{name}/test/{index}" for index in (1, 3, 5)]
    with pytest.raises(IndexError, match=f"sample {len(test)} of {len(test)}"):
        test[len(test)]


@pytest.mark.parametrize(("name", "side_px"), [("digits", 56), ("scene", 112)])
def test_pairs_are_visible_then_infrared_rgb_pngs_of_the_stated_size(name: str, side_px: int) -> None:
    sample = load_dataset(name).test[3]
    assert tuple(sample.images) == PAIR
    for data in sample.images.values():
        image = Image.open(io.BytesIO(data))
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (side_px, side_px))


@BOTH
def test_all_five_kinds_occur_about_as_often_as_stated(name: DatasetName) -> None:
    dataset: Dataset = load_dataset(name)
    counts = Counter(dataset.train[index].meta["kind"] for index in range(200))
    expected = {"only-visible": 40, "only-infrared": 40, "both": 20, "visible-misled": 50, "infrared-misled": 50}
    assert set(counts) == set(expected)
    assert all(abs(counts[kind] - count) < 20 for kind, count in expected.items())


def test_no_digit_image_is_on_both_sides_and_test_has_its_share() -> None:
    digits = DigitsDataset()
    train, test = digits.digits_of(Split.TRAIN), digits.digits_of(Split.TEST)
    assert len(train) + len(test) == 1797
    assert not {digits._inks[i].tobytes() for i in train} & {digits._inks[i].tobytes() for i in test}
    assert 330 < len(test) < 460


def test_digit_samples_show_only_digits_of_their_split() -> None:
    digits = DigitsDataset()
    for split, samples in ((Split.TRAIN, digits.train), (Split.TEST, digits.test), (Split.WARMUP, digits.warmup)):
        shown = {look["digit"] for index in range(60) for look in samples[index].meta["sources"].values()} - {None}
        assert shown <= set(digits.digits_of(split).tolist())


def test_a_misled_source_faintly_shows_another_digit_and_the_other_one_the_truth() -> None:
    samples = DigitsDataset().train[:60]
    misled = [sample for sample in samples if sample.meta["kind"] == SampleKind.VISIBLE_MISLED]
    assert misled
    for sample in misled:
        good, poor = sample.meta["sources"]["visible"], sample.meta["sources"]["infrared"]
        assert isinstance(sample.truth, TextTruth) and sample.truth.text == str(good["label"]) != str(poor["label"])
        assert 0.8 <= good["contrast"] <= 1.0 and 0.35 <= poor["contrast"] <= 0.6


def test_infrared_digits_are_inverted() -> None:
    samples = DigitsDataset().train[:60]
    both = next(sample for sample in samples if sample.meta["kind"] == SampleKind.BOTH)
    visible, infrared = (_pixels(data)[..., 0].ravel() for data in both.images.values())
    assert np.corrcoef(visible, infrared)[0, 1] < -0.5


def test_no_scene_seed_is_on_both_sides() -> None:
    scenes = SceneDataset()
    train = {scenes.scene_seed(split, index) for split in (Split.TRAIN, Split.WARMUP) for index in range(2000)}
    test = {scenes.scene_seed(Split.TEST, index) for index in range(2000)}
    assert len(train) == 4000 and len(test) == 2000 and not train & test


def test_scene_boxes_lie_in_the_image_apart_and_from_left_to_right() -> None:
    counts = Counter()
    for truth in (sample.truth for sample in SceneDataset().train[:80]):
        assert isinstance(truth, BoxesTruth) and (truth.width_px, truth.height_px) == (112, 112)
        assert all(0 <= x1 < x2 <= 112 and 0 <= y1 < y2 <= 112 for x1, y1, x2, y2 in truth.boxes)
        assert list(truth.boxes) == sorted(truth.boxes)
        assert all(value % 28 == 0 for box in truth.boxes for value in box)
        assert not any(_overlap(a, b) for a, b in itertools.combinations(truth.boxes, 2))
        counts[len(truth.boxes)] += 1
    assert set(counts) == {1, 2, 3} and counts[1] > counts[2] > counts[3]


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def test_a_person_fills_its_box() -> None:
    for seed in range(20):
        (person,) = place_persons(112, 1, np.random.default_rng(seed))
        mask = person.head | person.torso | person.legs
        columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
        around = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        assert np.abs(around - person.box).max() <= 1
        assert not (person.head & person.torso).any() and not (person.torso & person.legs).any()


def test_the_pattern_tells_where_a_patch_is() -> None:
    """Contrast of rows grows with x, of columns with y: both can be read off any patch of 14 px."""
    pattern = sensor_pattern(112)
    for x in range(0, 112, 14):
        for y in range(0, 112, 14):
            patch = pattern[y : y + 14, x : x + 14]
            along_rows, along_columns = np.abs(np.diff(patch.mean(axis=1))).mean(), np.abs(np.diff(patch.mean(axis=0))).mean()
            assert along_rows == pytest.approx((x + 6.5) / 111, abs=1e-9)
            assert along_columns == pytest.approx((y + 6.5) / 111, abs=1e-9)


def test_a_good_infrared_source_is_warm_inside_the_box_of_a_person() -> None:
    samples = SceneDataset().train[:40]
    for sample in (s for s in samples if s.meta["kind"] == SampleKind.ONLY_INFRARED):
        infrared = _pixels(sample.images["infrared"])[..., 0]
        x1, y1, x2, y2 = (int(value) for value in sample.truth.boxes[0])
        middle = infrared[y1 + (y2 - y1) // 4 : y1 + (y2 - y1) // 2, (x1 + x2) // 2 - 1 : (x1 + x2) // 2 + 2]
        assert middle.mean() > np.median(infrared) + 35


def test_an_unknown_dataset_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'nothing' is not a valid DatasetName"):
        load_dataset("nothing")
