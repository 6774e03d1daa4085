"""How fast something goes on and how long it will take, from what was done when."""

from __future__ import annotations

from collections import deque

REMEMBERED = 20
SPACING_S = 0.5
"""Moments that are closer count as one, so that a quick beat gives a steady rate."""


class Pace:
    """The rate over the last moments; starts anew when less is done than before.

    >>> pace = Pace()
    >>> for time_s, done in ((0.0, 0), (10.0, 5)):
    ...     pace.see(time_s, done)
    >>> pace.rate, pace.left_s(20), pace.text(20, "row")
    (0.5, 30.0, '2.0 s a row, 30 s left')
    """

    def __init__(self) -> None:
        self._moments: deque[tuple[float, int]] = deque(maxlen=REMEMBERED)

    def see(self, time_s: float, done: int) -> None:
        """Note how much was done at a time."""
        if self._moments and done < self._moments[-1][1]:
            self._moments.clear()
        if len(self._moments) > 1 and time_s - self._moments[-2][0] < SPACING_S:
            self._moments.pop()
        self._moments.append((time_s, done))

    @property
    def rate(self) -> float | None:
        """Per second; None until something was done."""
        if len(self._moments) < 2:
            return None
        (began, first), (ended, last) = self._moments[0], self._moments[-1]
        return (last - first) / (ended - began) if last > first and ended > began else None

    def left_s(self, total: int) -> float | None:
        """Seconds until `total` is done at this rate; None if the rate is unknown."""
        rate = self.rate
        return None if rate is None else max(0, total - self._moments[-1][1]) / rate

    def text(self, total: int | None, unit: str) -> str:
        """E.g. "2.0 s a step, 5 min left"; empty while nothing is known."""
        rate = self.rate
        if rate is None:
            return ""
        speed = f"{rate:.1f} {unit}s a second" if rate > 1 else f"{1 / rate:.1f} s a {unit}"
        left_s = None if total is None else self.left_s(total)
        return f"{speed}, {duration(left_s)} left" if left_s else speed


def duration(seconds: float) -> str:
    """E.g. "45 s", "12 min", "3 h 05 min", "2 d 4 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
