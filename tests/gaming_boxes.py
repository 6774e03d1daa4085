"""Boxes that try to overlap without knowing; format alone is worth 0.75, a found object up to 1 / number of objects more.

The image has 100 x 100 pixels. ONE holds the object (40, 40, 60, 60), TWO also (0, 0, 10, 10).
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from gaming import Attempt, fenced, thought_and
from mars_shared.contracts import BoxesTruth, BoxFrame, FrameKind

FORMAT = 0.75
PIXELS = BoxFrame(kind=FrameKind.ORIGINAL, width=100, height=100)
PER_MILLE = BoxFrame(kind=FrameKind.PER_MILLE, width=1000, height=1000)
ONE = BoxesTruth(boxes=((40, 40, 60, 60),), width_px=100, height_px=100)
TWO = BoxesTruth(boxes=((40, 40, 60, 60), (0, 0, 10, 10)), width_px=100, height_px=100)

OBJECT = '{"bbox_2d": [40, 40, 60, 60]}'
RIGHT = fenced(f"[{OBJECT}]")


def listed(boxes: Sequence[object]) -> str:
    return thought_and(fenced(json.dumps([{"bbox_2d": box, "label": "person"} for box in boxes])))


def raw(json_text: str) -> str:
    return thought_and(fenced(json_text))


def tiles(columns: int, rows: int) -> list[list[float]]:
    """The whole image in equal boxes."""
    wide, tall = 100 / columns, 100 / rows
    return [[x * wide, y * tall, (x + 1) * wide, (y + 1) * tall] for x in range(columns) for y in range(rows)]


NESTED_LISTS = "[" * 50_000 + "]" * 50_000

GUESSES = [
    # The mean over the objects takes the best guess of each and forgives the others, up to the limit of entries.
    # Of 4 x 3 tiles the best covers (50, 33.3, 75, 66.7): overlap 10 x 20 of 25 x 33.3 + 400 - 200.
    ("twelve tiles", ONE, listed(tiles(4, 3)), FORMAT + 200 / (2500 / 3 + 200)),
    # Of 2 x 2 tiles the best overlaps 10 x 10 of 50 x 50 + 400 - 100.
    ("four tiles", ONE, listed(tiles(2, 2)), FORMAT + 100 / 2800),
    (
        "every frame at once, one of them right",
        ONE,
        listed([[40, 40, 60, 60], [400, 400, 600, 600], [0.4, 0.4, 0.6, 0.6]]),
        FORMAT + 1,
    ),
]

MANY = [
    ("thirteen tiles of one object are too many", ONE, listed(tiles(13, 1)), FORMAT),
    ("a hundred tiles, one of them on an object", TWO, listed(tiles(10, 10)), FORMAT),
    ("ten thousand tiles", ONE, listed(tiles(100, 100)), FORMAT),
    ("the truth among thousands", ONE, listed([[40, 40, 60, 60]] * 5000), FORMAT),
    ("the truth behind unusable entries", ONE, raw(f"[{'0, ' * 12}{OBJECT}]"), FORMAT),
    # 20 x 20 of 100 x 100.
    ("the whole image", ONE, listed([[0, 0, 100, 100]]), FORMAT + 0.04),
    # The best assignment gives one the 0.04, the other 10 x 10 of 100 x 100.
    ("the whole image twice", TWO, listed([[0, 0, 100, 100]] * 2), FORMAT + (0.04 + 0.01) / 2),
    ("the whole image twelve times", ONE, listed([[0, 0, 100, 100]] * 12), FORMAT + 0.04),
    # 400 of 1e6 x 1e6.
    ("far beyond the image", ONE, listed([[0, 0, 1e6, 1e6]]), FORMAT + 4e-10),
    # One prediction counts for one object: (1 + 0) / 2.
    ("one object twice", TWO, listed([[40, 40, 60, 60]] * 2), FORMAT + 0.5),
    ("one object twelve times", TWO, listed([[40, 40, 60, 60]] * 12), FORMAT + 0.5),
    # (10, 0, 60, 60) encloses neither object twice: 20 x 20 of 60 x 60, and 10 x 10 of 60 x 60 for the second.
    ("one box around both, twice", TWO, listed([[0, 0, 60, 60]] * 2), FORMAT + (400 / 3600 + 100 / 3600) / 2),
]

BAD_COORDINATES = [
    ("inside out", "[60, 60, 40, 40]"),
    ("left is right", "[60, 40, 40, 60]"),
    ("a line", "[40, 40, 60, 40]"),
    ("a point", "[50, 50, 50, 50]"),
    ("NaN", "[NaN, NaN, NaN, NaN]"),
    ("one NaN", "[40, 40, 60, NaN]"),
    ("infinite", "[-Infinity, -Infinity, Infinity, Infinity]"),
    ("beyond floats", "[-1e999, -1e999, 1e999, 1e999]"),
    ("beyond any image", "[-1e300, -1e300, 1e300, 1e300]"),
    ("a million digits", "[40, 40, 60, " + "9" * 100_000 + "]"),
    ("strings", '["40", "40", "60", "60"]'),
    ("a float in words", '["4e1", "4e1", "6e1", "6e1"]'),
    ("booleans", "[false, false, true, true]"),
    ("null", "[null, null, null, null]"),
    ("lists", "[[40], [40], [60], [60]]"),
    ("corners", "[[40, 40], [60, 60]]"),
    ("boxes in a box", "[[40, 40, 60, 60], [40, 40, 60, 60], [40, 40, 60, 60], [40, 40, 60, 60]]"),
    ("three numbers", "[40, 40, 60]"),
    ("five numbers", "[40, 40, 60, 60, 60]"),
    ("eight numbers", "[40, 40, 60, 60, 0, 0, 10, 10]"),
    ("no numbers", "[]"),
    ("a name for each", '{"x1": 40, "y1": 40, "x2": 60, "y2": 60}'),
    ("an expression", "[40, 40, 20+40, 60]"),
    ("a fraction", "[40, 40, 120/2, 60]"),
    ("hexadecimal", "[0x28, 0x28, 0x3c, 0x3c]"),
    ("a string of lists", '"[40, 40, 60, 60], [0, 0, 10, 10]"'),
]

UNREADABLE = [
    ("an object instead of a list", OBJECT),
    ("a box instead of objects", "[40, 40, 60, 60]"),
    ("boxes instead of objects", "[[40, 40, 60, 60]]"),
    ("another key", '[{"bbox": [40, 40, 60, 60]}]'),
    ("the key in capitals", '[{"BBOX_2D": [40, 40, 60, 60]}]'),
    ("a list in a list", f"[[{OBJECT}]]"),
    ("boxes under one key", '{"boxes": [[40, 40, 60, 60]]}'),
    ("objects in objects", f'[{{"person": {OBJECT}}}]'),
    ("two lists", f"[{OBJECT}] [{OBJECT}]"),
    ("a list and words", f"[{OBJECT}] and more"),
    ("one object a line", f"{OBJECT}\n{OBJECT}"),
    ("Python's quotes", "[{'bbox_2d': [40, 40, 60, 60], 'label': 'person'}]"),
    ("a tuple", '[{"bbox_2d": (40, 40, 60, 60)}]'),
    ("a comment", f"[{OBJECT}] // person"),
    ("a comma behind the last", f"[{OBJECT},]"),
    ("not closed", f"[{OBJECT}"),
    ("nested deep", NESTED_LISTS),
    ("nested deep in an entry", f'[{{"bbox_2d": {NESTED_LISTS}}}]'),
    ("nothing", "[]"),
    ("null", "null"),
    ("a number", "1e3"),
    ("no text", ""),
]

PLACES = [
    # 0.25 each for one thought, one answer, one json block in a single answer.
    ("two blocks, the right one second", thought_and(fenced("[]") + RIGHT), 0.5),
    ("two blocks, the right one first loses its format", thought_and(RIGHT + fenced("[]")), 0.5 + 1),
    ("behind the answer", "<think>r</think><answer>none</answer>" + RIGHT, 0.5),
    ("in the thought alone", f"<think>{RIGHT}</think><answer>none</answer>", 0.5),
    ("in the second answer", "<think>r</think><answer>none</answer><answer>" + RIGHT + "</answer>", 0.25),
    ("in an answer that comes after another", thought_and(fenced("[]")) + f"<answer>{RIGHT}</answer>", 0.25),
    ("without a fence", thought_and(f"[{OBJECT}]"), 0.5),
    ("in a fence without name", thought_and(f"```\n[{OBJECT}]\n```"), 0.5),
    ("in a fence that stays open", thought_and(f"```json\n[{OBJECT}]"), 0.5),
    ("in a fence around the answer", f"<think>r</think>```json\n<answer>[{OBJECT}]</answer>\n```", 0.5),
    ("as points in words", thought_and("(40, 40), (60, 60)"), 0.5),
    ("as a box of tokens", thought_and("<box>40 40 60 60</box>"), 0.5),
]

KEYS = [
    # The last of two equal keys counts, one box an entry: (0, 0, 10, 10) misses, (40, 40, 60, 60) hits.
    ("a key twice, the right one first", ONE, raw('[{"bbox_2d": [40, 40, 60, 60], "bbox_2d": [0, 0, 10, 10]}]'), FORMAT),
    ("a key twice finds one of two", TWO, raw('[{"bbox_2d": [0, 0, 10, 10], "bbox_2d": [40, 40, 60, 60]}]'), FORMAT + 0.5),
    ("further keys hold further boxes", TWO, raw('[{"bbox_2d": [0, 0, 10, 10], "bbox": [40, 40, 60, 60]}]'), FORMAT + 0.5),
    ("a score of its own", ONE, raw('[{"bbox_2d": [0, 0, 10, 10], "iou": 1.0, "score": 1.0, "reward": 100}]'), FORMAT),
    ("a label that is the object's", ONE, raw('[{"bbox_2d": [0, 0, 10, 10], "label": [40, 40, 60, 60]}]'), FORMAT),
]

FRAMES = [
    # In a frame of 1000 the truth is (400, 400, 600, 600).
    ("pixels in a frame of per mille", PER_MILLE, listed([[40, 40, 60, 60]]), FORMAT),
    ("per mille in a frame of pixels", PIXELS, listed([[400, 400, 600, 600]]), FORMAT),
    ("shares of the image", PIXELS, listed([[0.4, 0.4, 0.6, 0.6]]), FORMAT),
    ("corner and size", PIXELS, listed([[40, 40, 20, 20]]), FORMAT),
    # (50, 50, 60, 60) lies within: 100 of 400.
    ("middle and far corner", PIXELS, listed([[50, 50, 60, 60]]), FORMAT + 0.25),
]

ATTEMPTS = [
    *(Attempt("guesses within the limit of entries", trick, truth, text, best, PIXELS) for trick, truth, text, best in GUESSES),
    *(Attempt("many, large or equal boxes", trick, truth, text, best, PIXELS) for trick, truth, text, best in MANY),
    *(Attempt("bad coordinates", trick, ONE, raw(f'[{{"bbox_2d": {box}}}]'), FORMAT, PIXELS) for trick, box in BAD_COORDINATES),
    *(Attempt("no list of objects", trick, ONE, raw(text), FORMAT, PIXELS) for trick, text in UNREADABLE),
    *(Attempt("another place", trick, ONE, text, best, PIXELS) for trick, text, best in PLACES),
    *(Attempt("further keys", trick, truth, text, best, PIXELS) for trick, truth, text, best in KEYS),
    *(Attempt("another frame", trick, ONE, text, best, frame) for trick, frame, text, best in FRAMES),
]

HONEST = [
    # (truth, completion): boxes as models write them who know the objects.
    (ONE, listed([[40, 40, 60, 60]])),
    (ONE, raw(f"[{OBJECT}]")),
    (ONE, thought_and(f"Here it is:\n{RIGHT}\nOne person.")),
    (ONE, raw("""[{'bbox_2d': '[40, 40, 60, 60]', "label": "person"}]""")),
    (ONE, raw('[{"bbox_2d": [4e1, 40.0, 60, 6.0e+1]}]')),
    (ONE, listed([[40, 40, 60, 60], [0, 0, 10, 10]])),
    (TWO, listed([[0, 0, 10, 10], [40, 40, 60, 60]])),
    (TWO, raw('[\n  {"label": "a", "bbox_2d": [0, 0, 10, 10]},\n  {"label": "b", "bbox_2d": [40, 40, 60, 60]}\n]')),
]
