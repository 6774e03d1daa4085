"""What is shown in a terminal: text from outside that cannot do anything there."""

from __future__ import annotations

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def printable(text: object) -> str:
    """Text in one line: escape sequences, line ends, invisible and text-turning characters are replaced one by one.

    >>> printable("a\\x1b[2Jb")
    'a�[2Jb'
    """
    return "".join(char if char.isprintable() else REPLACEMENT for char in str(text))


def printable_lines(text: str) -> str:
    """The same for a text of several lines, whose ends stay."""
    return "\n".join(printable(line) for line in text.split("\n"))
