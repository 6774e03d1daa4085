"""The frame of every report: one HTML file that loads nothing, runs nothing, and opens from disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mars_shared.report.markup import Markup, tag

HERE = Path(__file__).parent
STYLES = (HERE.parent / "ui" / "static" / "palette.css", HERE / "report.css")
"""The colours are the page's."""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def document(title: str, head: Markup, sections: Mapping[str, Markup]) -> str:
    """A whole page; sections by their titles, which a list at the top leads to."""
    places = {name: name.lower().replace(" ", "-") for name in sections}
    contents = tag("nav", *(tag("a", name, href=f"#{place}") for name, place in places.items()), aria_label="Contents")
    shown = [
        tag("section", tag("h2", name), content, id=places[name], class_="part-of-report") for name, content in sections.items()
    ]
    body = tag("body", tag("main", head, contents, *shown))
    meta = [
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
    ]
    style = tag("style", Markup("".join(path.read_text(encoding="utf-8") for path in STYLES)))
    return f"<!doctype html>\n{tag('html', tag('head', *meta, tag('title', title), style), body, lang='en')}\n"
