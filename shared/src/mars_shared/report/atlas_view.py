"""The conflict atlas as tables and as the groups that lost most."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mars_shared.blobs import BlobStore
from mars_shared.records.segments import Line
from mars_shared.report.atlas import Cell, Share, evaluation_atlas, sources_of, training_atlas, worst
from mars_shared.report.group_view import group_view
from mars_shared.report.history import Groups
from mars_shared.report.markup import Child, Markup, join, tag
from mars_shared.report.numbers import number, percent, signed

SHOWN_GROUPS = 3
"""Of each source."""


def atlas(groups: Groups, blobs: BlobStore) -> Markup:
    """Where single sources beat fusion: how often, by how much, and what that looks like."""
    facts = [line.facts for line in groups.lines]
    training, held_out = training_atlas(facts), evaluation_atlas(facts)
    if not training and not held_out:
        return tag("p", "No group with mono-source answers is recorded.", class_="none")
    parts = []
    if training:
        parts.append(_table("Training groups", training, ("first third", "last third")))
    if held_out:
        parts.append(_table("Held-out samples", held_out, ("first evaluation", "last evaluation")))
    return join([tag("p", EXPLANATION), *parts, *_shown(groups, blobs, sources_of(facts))])


EXPLANATION = (
    "A group loses to a source when that source alone earned a higher mean reward than all sources together. "
    "The deficit is the difference, on average over the groups that lose."
)


def _table(caption: str, cells: Sequence[Cell], parts: tuple[str, str]) -> Markup:
    heads = (
        "dataset",
        "source",
        "groups",
        "losing to it",
        "share",
        "mean deficit",
        *(f"share, {part}" for part in parts),
        "change",
    )
    rows = [
        tag(
            "tr",
            tag("th", tag("bdi", cell.dataset), scope="row"),
            tag("th", cell.source, scope="row"),
            *(tag("td", value, class_="value") for value in _values(cell)),
        )
        for cell in cells
    ]
    head = tag("tr", *(tag("th", name, scope="col") for name in heads))
    table = tag("table", tag("caption", caption), tag("thead", head), tag("tbody", *rows), class_="atlas")
    return tag("div", table, class_="wide")


def _values(cell: Cell) -> list[Child]:
    whole = cell.all
    change = None if cell.change is None else cell.change * 100
    return [
        whole.groups,
        whole.losing,
        _rate(whole),
        number(whole.deficit),
        _rate(cell.first),
        _rate(cell.last),
        f"{signed(change, 0)} points" if change is not None else signed(None),
    ]


def _rate(share: Share) -> Markup:
    """A percentage with a bar as long as it says."""
    if share.rate is None:
        return join([percent(None)])
    bar = tag("rect", x=0, y=0, width=f"{share.rate * 100:.1f}", height=10, class_="loss")
    drawing = tag("svg", bar, viewBox="0 0 100 10", preserveAspectRatio="none", class_="rate", aria_hidden="true")
    return join([drawing, percent(share.rate)])


def _shown(groups: Groups, blobs: BlobStore, sources: Sequence[str]) -> Iterator[Markup]:
    for source in sources:
        lines = worst(groups.lines, source, SHOWN_GROUPS)
        if lines:
            yield tag("h3", f"Training groups that lose most to {source}")
            yield from (_group(groups, blobs, line, source) for line in lines)


def _group(groups: Groups, blobs: BlobStore, line: Line, source: str) -> Markup:
    return group_view(groups.record(line), blobs, source)
