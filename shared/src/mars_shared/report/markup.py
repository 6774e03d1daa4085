"""Elements from data. Text goes in as text and never as markup, and what would hide or reorder it is made visible."""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape

SHOWN_CHARACTERS = 2000
VOID = {"br", "img", "meta"}
"""Elements of HTML that have no end."""

HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufe00-\ufe0f\ufeff"
    "\U000e0000-\U000e007f\U000e0100-\U000e01ef]"
)
"""Control characters, marks of direction, ends of lines and paragraphs, what has no width, variation selectors, tags, and halves of
surrogate pairs, which no encoding takes."""


class Markup(str):
    """Text that is HTML already; `tag` and `join` alone make it of what is not."""

    __slots__ = ()


Child = Markup | str | int | None
Attribute = str | float | bool | None


def tag(name: str, /, *children: Child, **attributes: Attribute) -> Markup:
    """An element of HTML or SVG.

    Args:
        children: text, which is escaped, or elements; None is left out.
        attributes: a trailing _ is dropped, others become -; None and False are left out, True has no value.

    Example:
        tag("th", "a < b", scope="col", class_="name") == '<th scope="col" class="name">a &lt; b</th>'
    """
    opening = f"<{name}{''.join(_attribute(key, value) for key, value in attributes.items())}>"
    return Markup(opening if name in VOID else f"{opening}{join(children)}</{name}>")


def join(children: Iterable[Child]) -> Markup:
    """Children one after another, text among them escaped."""
    return Markup("".join(_child(child) for child in children))


def visible(text: str) -> str:
    """Text in which hidden characters stand as their code points, e.g. \\u202e or \\u{e0041}."""
    return HIDDEN.sub(_code_point, text)


def _code_point(mark: re.Match[str]) -> str:
    code = ord(mark[0])
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\u{{{code:x}}}"


def said(text: str, *, limit: int = SHOWN_CHARACTERS, class_: str | None = None) -> Markup:
    """What a model, a dataset or an error said: kept apart from the direction of the text around it, cut with a note."""
    cut = None
    if len(text) > limit:
        cut = tag("span", f" … the first {limit:,} of {len(text):,} characters", class_="cut")
    return tag("span", tag("bdi", text[:limit]), cut, class_=class_)


def _child(child: Child) -> str:
    if child is None:
        return ""
    return child if isinstance(child, Markup) else escape(visible(str(child)))


def _attribute(key: str, value: Attribute) -> str:
    if value is None or value is False:
        return ""
    name = key.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{escape(visible(str(value)))}"'
