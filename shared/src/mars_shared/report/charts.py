"""Numbers to inline SVG: lines over steps, with bands, and stacked bars. Colours come from the page's style, by class.

Lines differ by dashes too, so that nothing is told by colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from mars_shared.report.markup import Markup, join, tag
from mars_shared.report.numbers import number

Values = Sequence[float | None]
WIDTH, HEIGHT = 480, 220
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 26
COLOURS = 5
DASHES = (None, "7 3", "2 2.5", "9 3 2 3", "4 4")


@dataclass(frozen=True)
class Series:
    """A line: a value for every one of its steps, None where there is none; `low` and `high` bound a band around it."""

    name: str
    steps: Sequence[int]
    values: Values
    low: Values = ()
    high: Values = ()


class Range(NamedTuple):
    low: float
    high: float

    def share(self, value: float) -> float:
        """Where a value is, from 0 at `low` to 1 at `high`."""
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class Frame:
    """The area of a chart: data to coordinates."""

    steps: Sequence[int]
    values: Range
    across: Range = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "across", Range(self.steps[0], max(self.steps[-1], self.steps[0] + 1)))

    def x(self, step: float) -> float:
        return LEFT + self.across.share(step) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return TOP + (1 - self.values.share(value)) * (HEIGHT - TOP - BOTTOM)


def line_chart(title: str, lines: Sequence[Series], *, points: bool = False) -> Markup:
    """A figure with a line for each series, and a legend.

    Args:
        lines: at least one, with at least one step, in order.
        points: mark every value, for few of them.
    """
    steps = sorted({step for line in lines for step in line.steps})
    present = [value for line in lines for part in (line.values, line.low, line.high) for value in part if value is not None]
    frame = Frame(steps, padded(min(0.0, *present), max(0.0, *present)))
    marks: list[Markup] = []
    for index, line in enumerate(lines):
        marks += _line(frame, line, index, points=points or sum(value is not None for value in line.values) == 1)
    described = ", ".join(f"{line.name} {number(last(line.values))}" for line in lines)
    drawing = _drawing(title, f"Steps {steps[0]} to {steps[-1]}; at the end {described}.", [*_grid(frame), *marks])
    return _figure(title, drawing, [(line.name, number(last(line.values))) for line in lines])


def stacked_chart(title: str, parts: Sequence[Series]) -> Markup:
    """A figure with a bar for every step, made of its parts, the first one lowest; all parts have the same steps."""
    steps = parts[0].steps
    totals = [math.fsum(part.values[place] or 0.0 for part in parts) for place in range(len(steps))]
    frame = Frame(steps, padded(0.0, max(totals)))
    width = (WIDTH - LEFT - RIGHT) / len(steps)
    bars = []
    for place in range(len(steps)):
        base = 0.0
        for index, part in enumerate(parts):
            top = base + (part.values[place] or 0.0)
            bars.append(_bar(frame, LEFT + place * width, width, (base, top), index))
            base = top
    described = ", ".join(f"{part.name} {number(last(part.values), 2)}" for part in parts)
    drawing = _drawing(title, f"Steps {steps[0]} to {steps[-1]}; at the end {described}.", [*_grid(frame), *bars])
    return _figure(title, drawing, [(part.name, None) for part in parts], filled=True)


def padded(low: float, high: float) -> Range:
    """With room at the ends, but at 0."""
    room = (high - low or 1.0) * 0.05
    return Range(low if low == 0 else low - room, high if high == 0 and low != 0 else high + room)


def ticks(values: Range, count: int = 4) -> list[float]:
    """About `count` round values within a range.

    >>> ticks(Range(0, 1.05))
    [0.0, 0.5, 1.0]
    """
    rough = (values.high - values.low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    size = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [place * size for place in range(math.ceil(values.low / size), math.floor(values.high / size) + 1)]


def last(values: Values) -> float | None:
    """The last value that there is."""
    return next((value for value in reversed(values) if value is not None), None)


def swatch(index: int, *, filled: bool = False) -> Markup:
    """What marks a series in a legend."""
    shape = (
        tag("rect", x=0, y=0, width=22, height=10, class_="bar", fill_opacity=_opacity(index))
        if filled
        else tag("line", x1=0, x2=22, y1=5, y2=5, class_="line", stroke_dasharray=_dash(index))
    )
    return tag("svg", shape, viewBox="0 0 22 10", class_=f"swatch {colour(index)}", aria_hidden="true")


def colour(index: int) -> str:
    """The class of a series."""
    return f"c{index % COLOURS}"


def _dash(index: int) -> str | None:
    return DASHES[(index + index // COLOURS) % len(DASHES)]


def _opacity(index: int) -> str:
    return "1" if index % 2 == 0 else "0.75"


def _line(frame: Frame, line: Series, index: int, *, points: bool) -> list[Markup]:
    marks = []
    if line.low and (outline := _outline(frame, line)):
        marks.append(tag("path", d=outline, class_="band"))
    marks.append(tag("path", d=_path(frame, line), class_="line", stroke_dasharray=_dash(index)))
    if points:
        places = [(step, value) for step, value in zip(line.steps, line.values, strict=True) if value is not None]
        marks += [tag("circle", cx=f"{frame.x(x):.1f}", cy=f"{frame.y(y):.1f}", r=2.6, class_="point") for x, y in places]
    return [tag("g", *marks, class_=colour(index))]


def _path(frame: Frame, line: Series) -> str:
    parts, pen = [], "M"
    for step, value in zip(line.steps, line.values, strict=True):
        if value is None:
            pen = "M"
            continue
        parts.append(f"{pen}{frame.x(step):.1f} {frame.y(value):.1f}")
        pen = "L"
    return "".join(parts)


def _outline(frame: Frame, line: Series) -> str:
    """Forth along the upper bound and back along the lower one, where there are both."""
    both = [
        (frame.x(step), low, high)
        for step, low, high in zip(line.steps, line.low, line.high, strict=True)
        if low is not None and high is not None
    ]
    corners = [(x, high) for x, _, high in both] + [(x, low) for x, low, _ in reversed(both)]
    return "L".join(f"{x:.1f} {frame.y(value):.1f}" for x, value in corners).join(("M", "Z")) if both else ""


def _bar(frame: Frame, left: float, width: float, span: tuple[float, float], index: int) -> Markup | None:
    top, bottom = frame.y(span[1]), frame.y(span[0])
    if bottom - top < 0.05:
        return None
    gap = min(1.0, width * 0.2)
    place = {"x": f"{left:.2f}", "y": f"{top:.1f}", "width": f"{width - gap:.2f}", "height": f"{bottom - top:.1f}"}
    return tag("rect", **place, class_=f"bar {colour(index)}", fill_opacity=_opacity(index))


def _grid(frame: Frame) -> list[Markup]:
    digits = max(0, min(6, 2 - math.floor(math.log10(frame.values.high - frame.values.low))))
    lines = []
    for value in ticks(frame.values):
        y = f"{frame.y(value):.1f}"
        lines.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="zero" if value == 0 else "grid"))
        lines.append(tag("text", number(value + 0.0, digits), x=LEFT - 6, y=f"{frame.y(value) + 4:.1f}", text_anchor="end"))
    lines.append(tag("text", str(frame.steps[0]), x=LEFT, y=HEIGHT - 6))
    lines.append(tag("text", f"step {frame.steps[-1]}", x=WIDTH - RIGHT, y=HEIGHT - 6, text_anchor="end"))
    return lines


def _drawing(title: str, described: str, marks: Sequence[Markup | None]) -> Markup:
    return tag("svg", tag("title", title), tag("desc", described), *marks, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img")


def _figure(title: str, drawing: Markup, legend: Sequence[tuple[str, str | None]], *, filled: bool = False) -> Markup:
    """`legend` is name and, if it is worth saying, the value at the end."""
    keys = [
        tag("li", swatch(index, filled=filled), f" {name}", tag("b", f" {value}") if value else None)
        for index, (name, value) in enumerate(legend)
    ]
    return tag("figure", tag("figcaption", title), drawing, tag("ul", join(keys), class_="legend"), class_="chart")
