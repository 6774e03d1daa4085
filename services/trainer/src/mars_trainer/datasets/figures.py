"""Drawing for the scene dataset: persons as masks, backgrounds by daylight and by warmth."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from mars_trainer.datasets.base import Plane

Mask = NDArray[np.bool_]
Box = tuple[int, int, int, int]

CANVAS_PX = 128
"""Height at which a person is drawn before it is fitted into its box."""
GRID_PX = 28
SIZES_CELLS = ((1, 2), (1, 3), (2, 3))
"""(width, height) of persons in cells of the grid."""


@dataclass(frozen=True)
class Person:
    """A standing person: the parts' masks, each [side, side], and the box around all of them.

    `box` is (x1, y1, x2, y2) in pixels; x2 and y2 lie just outside.
    """

    head: Mask
    torso: Mask
    legs: Mask
    box: Box


def draw_person(side_px: int, box: Box, rng: np.random.Generator) -> Person:
    """A person who fills `box`; stride, arms and shoulders vary."""
    stride, reach, shoulder = (rng.uniform(*span) for span in ((0.04, 0.17), (0.04, 0.2), (0.12, 0.16)))

    def at(dx: float, part: float) -> tuple[float, float]:
        return (1 + dx) * CANVAS_PX, part * CANVAS_PX

    def mask(ellipses: list[tuple[float, ...]], lines: list[list[tuple[float, float]]], width: float) -> Mask:
        image = Image.new("L", (2 * CANVAS_PX, CANVAS_PX))
        pen = ImageDraw.Draw(image)
        for ellipse in ellipses:
            pen.ellipse(ellipse, fill=1)
        for line in lines:
            pen.line(line, fill=1, width=round(width * CANVAS_PX))
        return np.asarray(image, dtype=bool)

    head = mask([(*at(-0.08, 0.0), *at(0.08, 0.17))], [], 0)
    arms = [[at(sign * shoulder, 0.23), at(sign * (shoulder + reach), 0.5)] for sign in (-1, 1)]
    torso = mask([], arms, 0.07) | mask([], [[at(0, 0.17), at(0, 0.55)]], 2 * shoulder)
    legs = mask([], [[at(sign * 0.07, 0.52), at(sign * stride, 1.0)] for sign in (-1, 1)], 0.1)
    head, torso, legs = _fitted([head, torso & ~head, legs & ~torso & ~head], box, side_px)
    return Person(head, torso, legs, box)


def _fitted(parts: list[Mask], box: Box, side_px: int) -> list[Mask]:
    """The parts, cut to the box around all of them and stretched to `box` of a [side, side] image."""
    whole = np.logical_or.reduce(parts)
    columns, rows = np.flatnonzero(whole.any(axis=0)), np.flatnonzero(whole.any(axis=1))
    around = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    x1, y1, x2, y2 = box
    fitted = []
    for part in parts:
        image = Image.fromarray(part).resize((x2 - x1, y2 - y1), Image.Resampling.NEAREST, around)
        mask = np.zeros((side_px, side_px), dtype=bool)
        mask[y1:y2, x1:x2] = np.asarray(image, dtype=bool)
        fitted.append(mask)
    return fitted


def place_persons(side_px: int, count: int, rng: np.random.Generator) -> list[Person]:
    """Up to `count` persons, left to right, who don't stand in front of one another.

    Boxes lie on a grid of GRID_PX: a tiny policy learns to name such numbers in minutes.
    """
    persons: list[Person] = []
    for _ in range(40 * count):
        width, height = (GRID_PX * int(cells) for cells in rng.choice(SIZES_CELLS))
        x, y = (GRID_PX * int(rng.integers(0, (side_px - size) // GRID_PX + 1)) for size in (width, height))
        box = (x, y, x + width, y + height)
        if all(_apart(box, other.box) for other in persons):
            persons.append(draw_person(side_px, box, rng))
        if len(persons) == count:
            break
    return sorted(persons, key=lambda person: person.box)


def _apart(a: Box, b: Box) -> bool:
    return a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


@dataclass(frozen=True)
class Place:
    """Where persons stand: by daylight [side, side, 3] and by warmth [side, side], both 0..1."""

    daylight: Plane
    warmth: Plane


def draw_place(side_px: int, rng: np.random.Generator) -> Place:
    """Sky, ground and a few blocks (walls, cars, bushes) with colours and slight warmth of their own."""
    rows = np.linspace(0.0, 1.0, side_px)[:, None]
    horizon = rng.uniform(0.25, 0.6)
    ground = (rows > horizon)[..., None]
    daylight = np.where(ground, rng.uniform(0.3, 0.6, 3), rng.uniform(0.55, 0.85, 3)) * np.ones((side_px, side_px, 3))
    warmth = np.where(ground[..., 0], rng.uniform(0.25, 0.35), rng.uniform(0.1, 0.2)) * np.ones((side_px, side_px))
    for _ in range(int(rng.integers(3, 7))):
        width, height = (int(rng.uniform(0.1, 0.45) * side_px) for _ in range(2))
        x, y = int(rng.integers(0, side_px - width)), int(rng.integers(0, side_px - height))
        daylight[y : y + height, x : x + width] = rng.uniform(0.2, 0.8, 3)
        warmth[y : y + height, x : x + width] = rng.uniform(0.15, 0.4)
    return Place(daylight, warmth)


def by_daylight(place: Place, persons: list[Person], clarity: float, rng: np.random.Generator) -> Plane:
    """[side, side, 3]; clarity is the light: 1 is noon, 0 is night."""
    image = place.daylight.copy()
    for person in persons:
        image[person.head] = rng.uniform(0.5, 0.9) * np.array([1.0, 0.8, 0.65])
        image[person.torso] = rng.uniform(0.0, 1.0, 3)
        image[person.legs] = rng.uniform(0.0, 0.5, 3)
    return 0.1 + 0.85 * clarity * image


def by_warmth(place: Place, persons: list[Person], clarity: float) -> Plane:
    """[side, side]; clarity is how much warmer persons are: 1 is a cold day, 0 is body heat all around."""
    image = place.warmth + 0.35 * (1 - clarity)
    for person in persons:
        for part, excess in ((person.head, 0.55), (person.torso, 0.45), (person.legs, 0.4)):
            image[part] += clarity * excess
    return image


def sensor_pattern(side_px: int) -> Plane:
    """[side, side] in -1..1: what a cheap sensor adds to every image, stripes whose contrast grows with x and with y.

    It tells where a patch is, whatever the patch shows: a model that knows positions by rotary
    embeddings alone needs far longer to learn to name coordinates.
    """
    stripes = 2.0 * (np.arange(side_px) % 2) - 1
    growing = np.linspace(0.0, 1.0, side_px)
    return 0.5 * (stripes[:, None] * growing[None, :] + stripes[None, :] * growing[:, None])
