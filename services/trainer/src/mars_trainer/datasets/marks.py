"""Places of images in the text of a question: `<image>`, or numbered `<image 1>`.

A prompt shows its images first, each under its source's name, and then the question; so marks are taken out of the text.
"""

from __future__ import annotations

import re

from mars_shared.errors import InputError

_MARK = re.compile(r"<image(?: (\d+))?>")
_MARK_AND_SPACES = re.compile(r"[ \t]*<image(?: \d+)?>[ \t]*")


def count_marks(text: str) -> int:
    """Marks in a text; a number that is repeated counts once, since it refers to one image."""
    numbers = [match.group(1) for match in _MARK.finditer(text)]
    return numbers.count(None) + len(set(numbers) - {None})


def without_marks(text: str) -> str:
    """A text without its marks, its lines stripped."""
    return "\n".join(line.strip() for line in _MARK_AND_SPACES.sub(" ", text).splitlines()).strip()


def check_marks(found: int, images: int, field: str) -> None:
    """Compare marks with images.

    Raises:
        InputError: there are not as many; `field` names file, row and field.
    """
    if found != images:
        raise InputError(f"{field}: {found} <image> marks for {images} images; expected one each")
