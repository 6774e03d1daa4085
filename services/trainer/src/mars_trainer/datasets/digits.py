"""Handwritten digits as visible + infrared pairs, of which often one source holds the answer.

The digits are real: the 1,797 of 8 x 8 that scikit-learn bundles (UCI, Alpaydin and Kaynak
1998). A source shows one at 56 x 56 with a contrast and noise; infrared is inverted. A good
source shows the digit well; a poor one shows noise, or faintly another digit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from mars_shared.contracts import TextTruth
from mars_trainer.datasets.base import (
    PAIR,
    LazySplit,
    Plane,
    Sample,
    SampleKind,
    Split,
    clear,
    encode_png,
    generator,
    stable_fraction,
)

QUESTION = "Which digit?"
SIDE_PX = 56
TEST_SHARE = 0.22
KIND_SHARES = {
    SampleKind.ONLY_VISIBLE: 0.2,
    SampleKind.ONLY_INFRARED: 0.2,
    SampleKind.BOTH: 0.1,
    SampleKind.VISIBLE_MISLED: 0.25,
    SampleKind.INFRARED_MISLED: 0.25,
}
_VISIBLE_HOLDS = {SampleKind.ONLY_VISIBLE, SampleKind.BOTH, SampleKind.VISIBLE_MISLED}
_INFRARED_HOLDS = {SampleKind.ONLY_INFRARED, SampleKind.BOTH, SampleKind.INFRARED_MISLED}


@dataclass(frozen=True)
class Appearance:
    """How one source shows a digit: `digit` None is noise alone; contrast and noise in units of full ink."""

    digit: int | None
    label: int | None
    contrast: float
    noise: float


class DigitsDataset:
    """Visible + infrared digit pairs with `TextTruth`; see the module's first lines."""

    name = "digits"

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

    @cached_property
    def _inks(self) -> NDArray[np.float64]:
        """All digits, [1797, 8, 8], 0 paper to 1 ink."""
        return np.asarray(load_digits().images, dtype=np.float64) / 16

    @cached_property
    def _labels(self) -> NDArray[np.int64]:
        return np.asarray(load_digits().target, dtype=np.int64)

    @cached_property
    def _is_test(self) -> NDArray[np.bool_]:
        """Decided by the digit's own pixels, so that equal images never stand on both sides."""
        return np.array([stable_fraction(ink.tobytes()) < TEST_SHARE for ink in self._inks])

    def digits_of(self, split: Split) -> NDArray[np.int64]:
        """Indices of the scikit-learn digits that a split draws from."""
        return np.flatnonzero(self._is_test if split is Split.TEST else ~self._is_test)

    def _pair(self, split: Split, index: int) -> Sample:
        rng = generator(self.name, self._seed, split, index)
        kind = SampleKind(rng.choice(list(KIND_SHARES), p=list(KIND_SHARES.values())))
        shown, other = self._two_digits(split, rng)
        poor = other if kind in (SampleKind.VISIBLE_MISLED, SampleKind.INFRARED_MISLED) else None
        looks = {
            "visible": self._good(shown, rng) if kind in _VISIBLE_HOLDS else self._poor(poor, rng),
            "infrared": self._good(shown, rng) if kind in _INFRARED_HOLDS else self._poor(poor, rng),
        }
        return self._sample(split, index, shown, looks, kind.thought, {"kind": kind.value}, rng)

    def _single(self, index: int) -> Sample:
        rng = generator(self.name, self._seed, Split.WARMUP, index)
        shown, _ = self._two_digits(Split.WARMUP, rng)
        look = self._look(shown, contrast=rng.uniform(0.35, 1.0), noise=float(rng.choice([0.12, 0.3])))
        name = str(rng.choice(PAIR))
        return self._sample(Split.WARMUP, index, shown, {name: look}, clear(name), {}, rng)

    def _sample(
        self,
        split: Split,
        index: int,
        shown: int,
        looks: dict[str, Appearance],
        thought: str,
        meta: dict[str, Any],
        rng: np.random.Generator,
    ) -> Sample:
        return Sample(
            prompt_id=f"{self.name}/{split}/{index}",
            question=QUESTION,
            images={name: encode_png(self._render(look, name == "infrared", rng)) for name, look in looks.items()},
            truth=TextTruth(text=str(self._labels[shown])),
            thought=thought,
            meta=meta | {"sources": {name: asdict(look) for name, look in looks.items()}},
        )

    def _two_digits(self, split: Split, rng: np.random.Generator) -> tuple[int, int]:
        """Indices of two digits of the split with different labels."""
        pool = self.digits_of(split)
        shown = int(rng.choice(pool))
        return shown, int(rng.choice(pool[self._labels[pool] != self._labels[shown]]))

    def _good(self, digit: int, rng: np.random.Generator) -> Appearance:
        return self._look(digit, contrast=rng.uniform(0.8, 1.0), noise=0.12)

    def _poor(self, digit: int | None, rng: np.random.Generator) -> Appearance:
        return self._look(digit, contrast=0.0 if digit is None else rng.uniform(0.35, 0.6), noise=0.3)

    def _look(self, digit: int | None, *, contrast: float, noise: float) -> Appearance:
        return Appearance(digit, None if digit is None else int(self._labels[digit]), float(contrast), noise)

    def _render(self, look: Appearance, inverted: bool, rng: np.random.Generator) -> Plane:
        """[56, 56]; ink 0..1 lies at grey 0.25..0.75, which leaves the noise room on both sides."""
        ink = np.zeros((SIDE_PX, SIDE_PX))
        if look.digit is not None:
            ink = np.kron(self._inks[look.digit], np.ones((SIDE_PX // 8, SIDE_PX // 8))) * look.contrast
            ink = look.contrast - ink if inverted else ink
        return 0.25 + 0.5 * (ink + rng.normal(0.0, look.noise, ink.shape))
