"""Generated visible + infrared pairs with one to three persons: grounding with boxes.

Both sources show one place. A good source shows the persons well; a poor one (night in the
visible, body heat all around in the infrared) shows none, or faintly persons elsewhere: a
reflection, a warm chimney.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from mars_shared.contracts import BoxesTruth
from mars_trainer.datasets.base import (
    PAIR,
    LazySplit,
    Sample,
    SampleKind,
    Split,
    clear,
    encode_png,
    generator,
    stable_fraction,
)
from mars_trainer.datasets.figures import Person, Place, by_daylight, by_warmth, draw_place, place_persons, sensor_pattern

QUESTION = "Find every person."
SIDE_PX = 112
TEST_SHARE = 0.2
PERSON_COUNT_SHARES = {1: 0.6, 2: 0.25, 3: 0.15}
KIND_SHARES = {
    SampleKind.ONLY_VISIBLE: 0.2,
    SampleKind.ONLY_INFRARED: 0.2,
    SampleKind.BOTH: 0.1,
    SampleKind.VISIBLE_MISLED: 0.25,
    SampleKind.INFRARED_MISLED: 0.25,
}
PATTERN = 0.25
"""Contrast of the sensors' pattern, in units of full white."""
_CANDIDATES = 512
"""Scene seeds set aside for one sample; the first that the hash gives to its split is taken."""


@dataclass(frozen=True)
class Look:
    """How one source shows the place: its persons, clarity 0..1, noise in units of full white."""

    persons: list[Person]
    clarity: float
    noise: float


class SceneDataset:
    """Visible + infrared pairs with `BoxesTruth` in pixels of the 112 x 112 images."""

    name = "scene"

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed

    @cached_property
    def train(self) -> Sequence[Sample]:
        return LazySplit(100_000, lambda index: self._pair(Split.TRAIN, index))

    @cached_property
    def test(self) -> Sequence[Sample]:
        return LazySplit(2_000, lambda index: self._pair(Split.TEST, index))

    @cached_property
    def warmup(self) -> Sequence[Sample]:
        return LazySplit(100_000, self._single)

    def scene_seed(self, split: Split, index: int) -> int:
        """The seed of everything that sample shows; no seed belongs to TEST and another split."""
        offset = 0 if split is not Split.WARMUP else 1_000_000
        for seed in range((offset + index) * _CANDIDATES, (offset + index + 1) * _CANDIDATES):
            is_test = stable_fraction(f"{self.name}/{self._seed}/{seed}".encode()) < TEST_SHARE
            if is_test is (split is Split.TEST):
                return seed
        raise AssertionError(f"none of {_CANDIDATES} scene seeds belongs to {split}")

    def _pair(self, split: Split, index: int) -> Sample:
        scene = self.scene_seed(split, index)
        rng = generator(self.name, self._seed, scene)
        kind = SampleKind(rng.choice(list(KIND_SHARES), p=list(KIND_SHARES.values())))
        place, persons, elsewhere = draw_place(SIDE_PX, rng), self._persons(rng), self._persons(rng)
        good = [Look(persons, float(rng.uniform(0.8, 1.0)), 0.05) for _ in PAIR]
        empty = Look([], 0.0, 0.15)
        misled = Look(elsewhere, float(rng.uniform(0.35, 0.6)), 0.15)
        visible, infrared = {
            SampleKind.ONLY_VISIBLE: (good[0], empty),
            SampleKind.ONLY_INFRARED: (empty, good[1]),
            SampleKind.BOTH: (good[0], good[1]),
            SampleKind.VISIBLE_MISLED: (good[0], misled),
            SampleKind.INFRARED_MISLED: (misled, good[1]),
        }[kind]
        looks = {"visible": visible, "infrared": infrared}
        return self._sample(split, index, place, persons, looks, kind.thought, {"kind": kind.value, "scene_seed": scene}, rng)

    def _single(self, index: int) -> Sample:
        scene = self.scene_seed(Split.WARMUP, index)
        rng = generator(self.name, self._seed, scene)
        place, persons = draw_place(SIDE_PX, rng), self._persons(rng)
        look = Look(persons, float(rng.uniform(0.35, 1.0)), float(rng.choice([0.05, 0.15])))
        name = str(rng.choice(PAIR))
        return self._sample(Split.WARMUP, index, place, persons, {name: look}, clear(name), {"scene_seed": scene}, rng)

    def _persons(self, rng: np.random.Generator) -> list[Person]:
        count = int(rng.choice(list(PERSON_COUNT_SHARES), p=list(PERSON_COUNT_SHARES.values())))
        return place_persons(SIDE_PX, count, rng)

    def _sample(
        self,
        split: Split,
        index: int,
        place: Place,
        persons: list[Person],
        looks: dict[str, Look],
        thought: str,
        meta: dict[str, Any],
        rng: np.random.Generator,
    ) -> Sample:
        return Sample(
            prompt_id=f"{self.name}/{split}/{index}",
            question=QUESTION,
            images={name: _render(name, place, look, rng) for name, look in looks.items()},
            truth=BoxesTruth(boxes=tuple(person.box for person in persons), width_px=SIDE_PX, height_px=SIDE_PX),
            thought=thought,
            meta=meta | {"sources": {name: _describe(look) for name, look in looks.items()}},
        )


def _render(name: str, place: Place, look: Look, rng: np.random.Generator) -> bytes:
    if name == "visible":
        image = by_daylight(place, look.persons, look.clarity, rng)
        pattern = sensor_pattern(SIDE_PX)[..., None]
    else:
        image = by_warmth(place, look.persons, look.clarity)
        pattern = sensor_pattern(SIDE_PX)
    return encode_png(image + PATTERN * pattern + rng.normal(0.0, look.noise, image.shape))


def _describe(look: Look) -> dict[str, Any]:
    return {"boxes": [list(person.box) for person in look.persons], "clarity": look.clarity, "noise": look.noise}
