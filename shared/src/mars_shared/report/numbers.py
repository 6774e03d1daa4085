"""Numbers as people read them."""

from __future__ import annotations

from collections.abc import Sequence

NONE = "–"


def number(value: float | None, digits: int = 3) -> str:
    """With a real minus sign; a dash where there is none.

    >>> number(-0.25)
    '−0.250'
    """
    return NONE if value is None else f"{value:.{digits}f}".replace("-", "−")


def signed(value: float | None, digits: int = 3) -> str:
    """With its sign, also above 0."""
    return NONE if value is None else f"{value:+.{digits}f}".replace("-", "−")


def interval(bounds: Sequence[float] | None, digits: int = 3) -> str:
    """Both bounds; nothing where there is no interval."""
    return "" if bounds is None else f"{number(bounds[0], digits)} to {number(bounds[1], digits)}"


def percent(share: float | None) -> str:
    return NONE if share is None else f"{share:.0%}"


def duration(seconds: float) -> str:
    """In the largest units that say it.

    >>> duration(3725)
    '1 h 02 min'
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
