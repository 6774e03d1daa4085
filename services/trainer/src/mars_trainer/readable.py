"""Texts of models and datasets for people: of limited length, and without characters that hide or do something."""

from __future__ import annotations

import unicodedata

_INVISIBLE = frozenset({"Cc", "Cf", "Co", "Cn", "Cs", "Zl", "Zp"})
r"""Unicode categories that are shown as escapes: controls, formats (bidirectional marks), surrogates, separators of lines."""


def readable(text: str, limit: int) -> str:
    r"""The text's first `limit` characters, and how many are left out; what is invisible as an escape, but for ends of lines.

    >>> readable("one\x00 two", 5)
    'one\\x00  ... (3 more characters)'
    """
    shown = "".join(_escaped(character) for character in text[:limit])
    return f"{shown} ... ({len(text) - limit:,} more characters)" if len(text) > limit else shown


def _escaped(character: str) -> str:
    if character != "\n" and unicodedata.category(character) in _INVISIBLE:
        return character.encode("unicode_escape", "surrogatepass").decode("ascii")
    return character
